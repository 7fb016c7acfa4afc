"""Megatron's indexed dataset: token ids in a `.bin` file, positions of sequences and documents in an `.idx` file.

Layout of the `.idx`, little-endian, as megatron-core's `IndexedDatasetBuilder` writes it:

    9 bytes   magic "MMIDIDX\\x00\\x00"
    uint64    version, 1
    uint8     code of the token format
    uint64    number of sequences, n
    uint64    number of document boundaries, m
    int32[n]  tokens of each sequence
    int64[n]  byte at which each sequence starts in the .bin
    int64[m]  sequence at which each document starts; the first is 0, the last is n
"""

import glob
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.errors import DataError, not_downloaded
from ascendspeed_data.files import INCOMPLETE
from ascendspeed_data.reading.inputs import read_errors

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
CHUNK_BYTES = 1 << 22
TOKEN_FORMATS: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def optimal_token_format(vocab_size: int) -> Any:
    """Return the format in which megatron-core stores ids below `vocab_size`."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclass(frozen=True)
class IndexedDatasetInfo:
    """Counts and token format of an indexed dataset."""

    num_sequences: int
    num_documents: int
    num_tokens: int
    format: str
    num_bytes: int


@dataclass(frozen=True)
class WriterState:
    """Progress of a writer; a new writer can resume from it.

    Attributes:
        num_bytes: bytes in the `.bin` file.
        num_sequences: sequences in it.
        num_documents: documents in it.
    """

    num_bytes: int = 0
    num_sequences: int = 0
    num_documents: int = 0


class IndexedDatasetWriter:
    """Write a `.bin`/`.idx` pair incrementally; the files get their final names when they are complete.

    Lengths go to temporary files, so memory does not grow with the number of documents.

    Args:
        prefix: path without `.bin`.
        token_format: numpy integer type of the ids.
        state: resume unfinished files from here; later data in them is dropped.
        keep: whether to keep the unfinished files if the `with` block raises.
    """

    def __init__(
        self, prefix: Path, token_format: Any, state: WriterState | None = None, keep: bool = False
    ) -> None:
        self.prefix = prefix
        self.keep = keep
        self.format = np.dtype(token_format)
        self.state = state or WriterState()
        prefix.parent.mkdir(parents=True, exist_ok=True)
        sizes = (self.state.num_bytes, 4 * self.state.num_sequences, 4 * self.state.num_documents)
        self._files = [
            _open_at(path, size) for path, size in zip(self.scratch_paths(prefix), sizes, strict=True)
        ]

    @staticmethod
    def scratch_paths(prefix: Path) -> tuple[Path, Path, Path]:
        """Return the unfinished files: token ids, length of each sequence, sequences of each document (both int32)."""
        names = (".bin", ".lengths", ".documents")
        return tuple(_with_suffix(prefix, name + INCOMPLETE) for name in names)  # type: ignore[return-value]

    def add_documents(
        self,
        lengths: Sequence[int] | NDArray[Any],
        tokens: NDArray[Any],
        sequences: NDArray[Any] | None = None,
    ) -> None:
        """Append documents.

        Args:
            lengths: tokens of each sequence.
            tokens: concatenated ids of the sequences.
            sequences: number of sequences of each document; one by default.
        """
        of_sequences = np.asarray(lengths, dtype=np.int32)
        of_documents = (
            np.ones(len(of_sequences), np.int32) if sequences is None else sequences.astype(np.int32)
        )
        assert int(of_sequences.sum(dtype=np.int64)) == len(tokens)
        assert int(of_documents.sum(dtype=np.int64)) == len(of_sequences)
        content = tokens.astype(self.format, copy=False)
        for file, array in zip(self._files, (content, of_sequences, of_documents), strict=True):
            file.write(np.ascontiguousarray(array).data)
        self.state = WriterState(
            self.state.num_bytes + content.nbytes,
            self.state.num_sequences + len(of_sequences),
            self.state.num_documents + len(of_documents),
        )

    def flush(self) -> None:
        """Flush all added documents to the disk."""
        for file in self._files:
            _to_disk(file)

    def prepare(self) -> list[tuple[Path, Path]]:
        """Write the index under its temporary name; return pairs of temporary and final path."""
        self.flush()
        bin_path, lengths_path, documents_path = self.scratch_paths(self.prefix)
        idx_path = _with_suffix(self.prefix, ".idx" + INCOMPLETE)
        code = next(code for code, known in TOKEN_FORMATS.items() if np.dtype(known) == self.format)
        with idx_path.open("wb") as file:
            file.write(
                HEADER.pack(MAGIC, VERSION, code, self.state.num_sequences, self.state.num_documents + 1)
            )
            for chunk in _chunks(lengths_path):
                file.write(chunk.data)
            _write_starts(file, lengths_path, self.format.itemsize, with_end=False)
            _write_starts(file, documents_path, 1, with_end=True)
            _to_disk(file)
        return [
            (bin_path, _with_suffix(self.prefix, ".bin")),
            (idx_path, _with_suffix(self.prefix, ".idx")),
        ]

    def finish(self) -> None:
        """Write the index and give both files their final names."""
        for source, target in self.prepare():
            source.replace(target)
        self.discard()

    def discard(self) -> None:
        """Delete the unfinished files."""
        for file in self._files:
            # Closing flushes the buffer, which fails on a full disk; the file is deleted anyway.
            with suppress(OSError):
                file.close()
        for path in (*self.scratch_paths(self.prefix), _with_suffix(self.prefix, ".idx" + INCOMPLETE)):
            path.unlink(missing_ok=True)

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.keep:
            self.discard()
        for file in self._files:
            with suppress(OSError):
                file.close()


class IndexedDataset:
    """Read a `.bin`/`.idx` pair; tokens are memory-mapped.

    Args:
        prefix: path without `.bin`.

    Raises:
        DataError: a file is missing or damaged.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        with read_errors(prefix):
            self._format, self.lengths, self._starts, self.documents = _read_index(prefix)
            bin_path = _existing(prefix, ".bin")
            size = bin_path.stat().st_size
            _check_pointers(prefix, self._format, self.lengths, self._starts, size)
            self._tokens: NDArray[Any] = (
                np.memmap(bin_path, dtype=self._format, mode="r") if size else np.empty(0, self._format)
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> NDArray[Any]:
        """Return the ids of a sequence, [tokens]."""
        start = int(self._starts[number]) // self._format.itemsize
        return self._tokens[start : start + int(self.lengths[number])]

    @property
    def info(self) -> IndexedDatasetInfo:
        """Counts and format."""
        return IndexedDatasetInfo(
            num_sequences=len(self.lengths),
            num_documents=len(self.documents) - 1,
            num_tokens=int(self.lengths.sum(dtype=np.int64)),
            format=self._format.name,
            num_bytes=self._tokens.nbytes,
        )


def _read_index(prefix: Path) -> tuple[np.dtype[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    path = _existing(prefix, ".idx")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or head[:9] != MAGIC:
        raise DataError(
            f"{path} is not the index of an indexed dataset (its first bytes are {head[:9]!r}); preprocess again"
        )
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != VERSION or code not in TOKEN_FORMATS:
        raise DataError(
            f"{path}: version={version}, token format {code}; supported are version 1 and the token formats "
            f"{list(TOKEN_FORMATS)}"
        )
    expected = HEADER.size + sequences * (4 + 8) + boundaries * 8
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, but {sequences} sequences and {boundaries} document boundaries need "
            f"{expected}; the file is incomplete or damaged, so preprocess again"
        )
    content = (
        np.memmap(path, mode="r", offset=HEADER.size) if expected > HEADER.size else np.empty(0, np.uint8)
    )
    lengths = content[: 4 * sequences].view(np.int32)
    starts = content[4 * sequences : 12 * sequences].view(np.int64)
    documents = content[12 * sequences :].view(np.int64)
    if boundaries < 1 or documents[0] != 0 or documents[-1] != sequences or np.any(np.diff(documents) < 0):
        raise DataError(
            f"{path}: document boundaries do not increase from 0 to {sequences}; preprocess again"
        )
    return np.dtype(TOKEN_FORMATS[code]), lengths, starts, documents


def _check_pointers(
    prefix: Path, token_format: np.dtype[Any], lengths: NDArray[Any], starts: NDArray[Any], size: int
) -> None:
    ends = np.cumsum(lengths, dtype=np.int64) * token_format.itemsize
    bad = np.flatnonzero((lengths < 0) | (starts < 0) | (ends > size) | (starts > size))
    if len(bad):
        number = int(bad[0])
        raise DataError(
            f"{prefix}.idx: sequence {number} ({int(lengths[number])} tokens at byte {int(starts[number])}) is "
            f"outside {prefix}.bin, which has {size} bytes; the .bin is incomplete or belongs to another .idx"
        )
    expected = ends - lengths.astype(np.int64) * token_format.itemsize
    misplaced = np.flatnonzero(starts != expected)
    if len(misplaced):
        number = int(misplaced[0])
        raise DataError(
            f"{prefix}.idx: sequence {number} begins at byte {int(starts[number])}, but the sequences before it end "
            f"at byte {int(expected[number])}; the .idx is damaged, so preprocess again"
        )
    total = int(ends[-1]) if len(ends) else 0
    if size != total:
        raise DataError(
            f"{prefix}.bin has {size} bytes, but {prefix}.idx ends at byte {total}; the .bin was added to or belongs "
            "to another .idx"
        )


def _existing(prefix: Path, suffix: str) -> Path:
    path = _with_suffix(prefix, suffix)
    if not path.is_file():
        stripped = str(prefix).removesuffix(".bin").removesuffix(".idx")
        hint = (
            f"give the prefix without the ending: {stripped}"
            if stripped != str(prefix)
            else _how_to_make(prefix)
        )
        raise DataError(f"{path} does not exist; {hint}")
    return path


def _how_to_make(prefix: Path) -> str:
    """Say what to do where a prefix leads to nothing: raw data, a folder, a name of the hub, names with commas."""
    if prefix.is_file():
        return (
            f"{prefix} is not tokenized yet: asd-data preprocess --input {prefix} --output-prefix PREFIX "
            "--tokenizer-name-or-path DIR makes the files; give their prefix, PREFIX_text_document (of instruction "
            "sets and conversations add --handler-name, which `asd-data handlers` lists, and give PREFIX)"
        )
    if prefix.is_dir():
        found = sorted(path.with_suffix("") for path in prefix.glob("*.idx"))[:3]
        return (
            f"{prefix} is a folder; give a prefix in it: {', '.join(map(str, found))}"
            if found
            else f"{prefix} is a folder without .idx files; asd-data preprocess makes them of your records"
        )
    if "," in str(prefix):
        return "separate several prefixes by spaces, each after its weight"
    near = sorted(path.with_suffix("") for path in prefix.parent.glob(f"{glob.escape(prefix.name)}_*.idx"))[
        :3
    ]
    return (
        f"did you mean {' or '.join(map(str, near))}?"
        if near
        else not_downloaded(prefix) or "check the prefix"
    )


def _open_at(path: Path, size: int) -> Any:
    """Open a file to write after its first `size` bytes, and truncate it there."""
    have = path.stat().st_size if path.exists() else 0
    if have < size:
        raise DataError(
            f"{path} has {have} bytes, but the journal records {size}; give --overwrite to start again"
        )
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file


def _chunks(path: Path) -> Iterator[NDArray[np.int32]]:
    with path.open("rb") as file:
        while content := file.read(CHUNK_BYTES):
            yield np.frombuffer(content, np.int32)


def _write_starts(file: Any, path: Path, unit: int, with_end: bool) -> None:
    """Write the start of each item, int64, from a file of lengths; optionally also the end of the last item."""
    start = 0
    for lengths in _chunks(path):
        ends = start + np.cumsum(lengths, dtype=np.int64) * unit
        file.write((ends - lengths.astype(np.int64) * unit).data)
        start = int(ends[-1])
    if with_end:
        file.write(np.int64(start).tobytes())


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
