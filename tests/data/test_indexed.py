"""The .bin/.idx files are megatron-core's, in both directions, and damage is found."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset as TheirDataset
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from ascendspeed_data.errors import DataError
from ascendspeed_data.indexed import HEADER, IndexedDataset, IndexedDatasetWriter

LENGTHS = [3, 1, 0, 7, 250, 2]


def documents(token_format: Any) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(7)
    return [generator.integers(0, 60000, length).astype(token_format) for length in LENGTHS]


@pytest.mark.parametrize("token_format", [np.uint16, np.int32, np.int64])
def test_bytes_equal_megatron_core(tmp_path: Path, token_format: Any) -> None:
    made = documents(token_format)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=token_format)
    for document in made:
        builder.add_document(torch.from_numpy(document.astype(np.int64)), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedDatasetWriter(tmp_path / "ours", token_format) as writer:
        writer.add_documents(LENGTHS[:2], np.concatenate(made[:2]))
        writer.add_documents(LENGTHS[2:], np.concatenate(made[2:]))
        writer.finish()
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / (name + suffix) for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    read = TheirDataset(str(tmp_path / "ours"))
    assert all(np.array_equal(read[i], document) for i, document in enumerate(made))


def test_documents_of_several_sequences_are_read(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.int32)
    builder.add_document(torch.arange(10), [4, 6])
    builder.add_document(torch.arange(100, 105), [5])
    builder.finalize(str(tmp_path / "x.idx"))
    read = IndexedDataset(tmp_path / "x")
    assert [read[i].tolist() for i in range(len(read))] == [
        list(range(4)),
        list(range(4, 10)),
        list(range(100, 105)),
    ]
    assert (read.info.num_sequences, read.info.num_documents, read.info.num_tokens) == (3, 2, 15)
    assert read.documents.tolist() == [0, 2, 3]


def put(path: Path, place: int, value: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)


COUNT_AT, BOUNDARIES_AT, LENGTHS_AT = 18, 26, HEADER.size
STARTS_AT = LENGTHS_AT + 4 * len(LENGTHS)
DOCUMENTS_AT = STARTS_AT + 8 * len(LENGTHS)
DAMAGE: dict[str, tuple[Any, str]] = {
    "no .bin": (lambda b, i: b.unlink(), r"\.bin does not exist"),
    "no .idx": (lambda b, i: i.unlink(), r"\.idx does not exist"),
    "an empty .idx": (lambda b, i: i.write_bytes(b""), "not the index"),
    "another file": (lambda b, i: put(i, 0, b"PK\x03\x04"), "not the index"),
    "another version": (lambda b, i: put(i, 9, struct.pack("<Q", 2)), "version=2"),
    "an unknown format": (lambda b, i: put(i, 17, b"\x63"), "token format 99"),
    "a .bin cut short": (lambda b, i: b.write_bytes(b.read_bytes()[:-2]), r"is outside .*\.bin"),
    "an .idx cut short": (lambda b, i: i.write_bytes(i.read_bytes()[:-1]), "boundaries need"),
    "a longer .idx": (lambda b, i: i.write_bytes(i.read_bytes() + b"\0" * 8), "boundaries need"),
    "a count beyond the file": (lambda b, i: put(i, COUNT_AT, struct.pack("<Q", 1 << 40)), "boundaries need"),
    "boundaries beyond the file": (
        lambda b, i: put(i, BOUNDARIES_AT, struct.pack("<Q", 9)),
        "boundaries need",
    ),
    "a length beyond the file": (lambda b, i: put(i, LENGTHS_AT, struct.pack("<i", 9999)), "is outside"),
    "a negative length": (lambda b, i: put(i, LENGTHS_AT, struct.pack("<i", -1)), "is outside"),
    "a pointer beyond the file": (lambda b, i: put(i, STARTS_AT, struct.pack("<q", 1 << 50)), "is outside"),
    "a negative pointer": (lambda b, i: put(i, STARTS_AT, struct.pack("<q", -2)), "is outside"),
    "a pointer between two ids": (lambda b, i: put(i, STARTS_AT, struct.pack("<q", 1)), "begins at byte 1"),
    "a .bin that was added to": (lambda b, i: b.write_bytes(b.read_bytes() + b"\0"), r"\.bin has .* bytes"),
    "boundaries that fall": (lambda b, i: put(i, DOCUMENTS_AT + 8, struct.pack("<q", 6)), "do not increase"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_reported(tmp_path: Path, damage: str) -> None:
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_documents(LENGTHS, np.concatenate(documents(np.uint16)))
        writer.finish()
    assert IndexedDataset(tmp_path / "x").info.num_tokens == sum(LENGTHS)
    apply, complaint = DAMAGE[damage]
    apply(tmp_path / "x.bin", tmp_path / "x.idx")
    with pytest.raises(DataError, match=complaint) as raised:
        IndexedDataset(tmp_path / "x")
    assert "\n" not in str(raised.value)


def test_a_prefix_with_a_suffix_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"without the ending: .*/x$"):
        IndexedDataset(tmp_path / "x.bin")


def test_an_aborted_writer_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_documents([1], np.zeros(1, np.uint16))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
