"""Text becomes the ids that the tokenizer gives, whatever the file format and the number of workers."""

import csv
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece

from ascendspeed_data.indexed import IndexedDataset
from ascendspeed_data.manifest import load_manifest, manifest_path
from support.commands import call, command_line, environment
from support.corpus import make_texts, write_json_lines

TEXTS = make_texts(150, seed=3)


def preprocess(tmp_path: Path, tokenizer: Path, *inputs: object, name: str = "out", **flags: object) -> Path:
    options = [
        word
        for key, value in flags.items()
        for word in (f"--{key.replace('_', '-')}", *([] if value is True else [value]))
    ]
    done = call(
        "asd-data", "preprocess", "--input", *inputs, "--output-prefix", tmp_path / name,
        "--tokenizer-name-or-path", tokenizer, *options,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    return tmp_path / f"{name}_text_document"


def bytes_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def as_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows({"id": i, "text": text} for i, text in enumerate(TEXTS))


def as_arrow(path: Path, opener: Any) -> None:
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.OSFile(str(path), "wb") as sink, opener(sink, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "x.jsonl": lambda p: write_json_lines(p, TEXTS),
    "x.json": lambda p: p.write_text(json.dumps([{"text": text} for text in TEXTS])),
    "lines.json": lambda p: write_json_lines(p, TEXTS),
    "x.csv": as_csv,
    "x.parquet": lambda p: pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), p),
    "stream.arrow": lambda p: as_arrow(p, pyarrow.ipc.new_stream),
    "file.arrow": lambda p: as_arrow(p, pyarrow.ipc.new_file),
    "x.jsonl.gz": lambda p: p.write_bytes(
        gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode())
    ),
}


@pytest.fixture(scope="module")
def reference(tokenizer_folder: Path) -> list[list[int]]:
    """What SentencePiece says, with BOS in front as the folder asks, and the end of a document behind."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))
    return [[1, *model.encode(text), 2] for text in TEXTS]


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_format_gives_the_ids_of_the_tokenizer(
    tmp_path: Path, tokenizer_folder: Path, reference: list[list[int]], name: str
) -> None:
    WRITERS[name](tmp_path / name)
    dataset = IndexedDataset(preprocess(tmp_path, tokenizer_folder, tmp_path / name))
    assert [dataset[i].tolist() for i in range(len(dataset))] == reference
    assert dataset.info.format == "uint16"


def test_lines_of_a_text_file_are_documents(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "x.txt").write_text("one line\n\nanother\r\nlast without an end", encoding="utf-8")
    prefix = preprocess(tmp_path, tokenizer_folder, tmp_path / "x.txt")
    manifest = load_manifest(prefix)
    assert manifest is not None
    assert (manifest.num_documents, manifest.num_empty_documents) == (3, 1)


def test_the_number_of_workers_does_not_change_the_bytes(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_json_lines(tmp_path / "x.jsonl", make_texts(400))
    one = preprocess(tmp_path, tokenizer_folder, tmp_path / "x.jsonl", name="one")
    three = preprocess(tmp_path, tokenizer_folder, tmp_path / "x.jsonl", name="three", workers=3)
    assert bytes_of(one) == bytes_of(three)


def test_the_manifest_has_the_counts_and_hashes(tmp_path: Path, tokenizer_folder: Path) -> None:
    texts = [*TEXTS[:20], "", TEXTS[20]]
    source = write_json_lines(tmp_path / "x.jsonl", texts)
    prefix = preprocess(tmp_path, tokenizer_folder, source)
    manifest = load_manifest(prefix)
    assert manifest is not None
    dataset = IndexedDataset(prefix)
    ids = [token for i in range(len(dataset)) for token in dataset[i].tolist()]
    counts = Counter(ids)
    entropy = -sum(n / len(ids) * log(n / len(ids)) for n in counts.values())
    assert manifest.num_documents == len(dataset) == 21
    assert manifest.num_empty_documents == 1
    assert manifest.num_tokens == len(ids)
    assert manifest.num_text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest.unigram_entropy_nats == pytest.approx(entropy, rel=1e-12)
    assert manifest.inputs[0].sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert manifest.inputs[0].num_bytes == source.stat().st_size
    special = (manifest.tokenizer.bos_id, manifest.tokenizer.eos_id, manifest.tokenizer.unk_id)
    assert special == (1, 2, 0)


def test_without_append_eod_documents_have_no_end(
    tmp_path: Path, tokenizer_folder: Path, reference: list[list[int]]
) -> None:
    WRITERS["x.jsonl"](tmp_path / "x.jsonl")
    dataset = IndexedDataset(preprocess(tmp_path, tokenizer_folder, tmp_path / "x.jsonl", no_append_eod=True))
    assert dataset[0].tolist() == reference[0][:-1]


def test_several_columns_and_files_give_one_dataset_per_column(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    for part in range(3):
        records = [{"title": f"title {part}", "text": text} for text in TEXTS[part * 10 : part * 10 + 10]]
        (tmp_path / f"part{part}.jsonl").write_text("\n".join(map(json.dumps, records)))
    done = call(
        "asd-data", "preprocess", "--input", tmp_path / "part*.jsonl", "--output_prefix", tmp_path / "two",
        "--tokenizer_name_or_path", tokenizer_folder, "--json-keys", "text", "title",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    texts = IndexedDataset(tmp_path / "two_text_document")
    assert len(texts) == len(IndexedDataset(tmp_path / "two_title_document")) == 30
    whole = write_json_lines(tmp_path / "whole.jsonl", TEXTS[:30])
    prefix = preprocess(tmp_path, tokenizer_folder, whole, name="one")
    assert bytes_of(prefix) == bytes_of(tmp_path / "two_text_document")


def test_verify_and_inspect(dataset: Path, tokenizer_folder: Path) -> None:
    done = call("asd-data", "verify", dataset)
    assert done.status == 0
    assert "is complete: 200 documents" in done.stdout
    shown = json.loads(
        call(
            "asd-data", "inspect", dataset, "--json", "--documents", 1, "--max-tokens", 5,
            "--tokenizer-name-or-path", tokenizer_folder,
        ).stdout
    )  # fmt: skip
    assert shown["num_documents"] == 200
    assert len(shown["documents"][0]["ids"]) == 5
    assert shown["manifest"]["handler"] == "GeneralPretrainHandler"
    assert shown["documents"][0]["text"]


def test_verify_finds_changed_files_and_manifests(dataset: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{dataset}{suffix}", tmp_path / f"x{suffix}")
    path = manifest_path(tmp_path / "x")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"num_tokens": content["num_tokens"] + 1}))
    assert "the files do not belong together" in call("asd-data", "verify", tmp_path / "x").complaint
    path.write_text(json.dumps(content | {"tokenizer": content["tokenizer"] | {"vocab_size": 300}}))
    assert "vocab_size=300" in call("asd-data", "verify", tmp_path / "x").complaint
    path.write_text(json.dumps(content | {"format_version": 99}))
    assert "update ascendspeed-data" in call("asd-data", "verify", tmp_path / "x").complaint
    path.write_text(json.dumps(content)[:-20])
    assert "is damaged" in call("asd-data", "verify", tmp_path / "x").complaint


def test_a_killed_run_keeps_the_earlier_output(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_json_lines(tmp_path / "x.jsonl", TEXTS)
    prefix = preprocess(tmp_path, tokenizer_folder, source)
    before = bytes_of(prefix)
    write_json_lines(source, make_texts(40_000, seed=9))
    running = subprocess.Popen(
        command_line(
            "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out",
            "--tokenizer-name-or-path", tokenizer_folder, "--overwrite",
        ),
        env=environment(),
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    scratch = Path(f"{prefix}.bin.incomplete")
    wait_until(lambda: scratch.exists() and scratch.stat().st_size > 0)
    second = call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out",
        "--tokenizer-name-or-path", tokenizer_folder, "--overwrite",
    )  # fmt: skip
    assert second.status == 1
    assert f"is being written by another run (process {running.pid})" in second.complaint
    os.kill(running.pid, signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert bytes_of(prefix) == before
    assert load_manifest(prefix) is not None
    write_json_lines(source, TEXTS)
    preprocess(tmp_path, tokenizer_folder, source, overwrite=True)
    assert bytes_of(prefix) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [source.name, *(f"{prefix.name}{suffix}" for suffix in (".bin", ".idx", ".manifest.json"))]
    )


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "no such file": ("missing.jsonl", b"", "matches no supported file"),
    "an unknown ending": ("x.docx", b"x", "has an unsupported format"),
    "an empty file": ("x.jsonl", b"", "has no records"),
    "not JSON": ("x.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
    "a list": ("x.jsonl", b"[1, 2]\n", "line 1: expected a JSON object"),
    "another column": (
        "x.jsonl",
        b'{"body": "a"}\n',
        "line 1: no column 'text' (--json-key); the record has body",
    ),
    "a number": ("x.jsonl", b'{"text": 5}\n', "column 'text' holds int, not text"),
    "only empty texts": ("x.jsonl", b'{"text": ""}\n', "has no text"),
    "half a surrogate pair": ("x.jsonl", b'{"text": "a\\ud83d"}\n', "half a surrogate pair at character 1"),
    "not UTF-8": ("x.jsonl", b'{"text": "\xff"}\n', "cannot be read"),
    "a cut gzip": ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9], "cannot be read"),
    "a cut Parquet file": ("x.parquet", b"PAR1....", "damaged or not a Parquet file"),
    "a cut Arrow file": ("x.arrow", b"ARROW1", "damaged or not an Arrow file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_reported(tmp_path: Path, tokenizer_folder: Path, case: str) -> None:
    name, content, complaint = BAD_FILES[case]
    if case != "no such file":
        (tmp_path / name).write_bytes(content)
    done = call(
        "asd-data", "preprocess", "--input", tmp_path / name, "--output-prefix", tmp_path / "out",
        "--tokenizer-name-or-path", tokenizer_folder,
    )  # fmt: skip
    assert done.status in (1, 2)
    assert complaint in done.complaint
    assert name in done.complaint
    assert not list(tmp_path.glob("out*"))


BAD_FLAGS: dict[str, tuple[list[object], int, str]] = {
    "a flag that is not": (["--worker", 2], 2, "did you mean --workers"),
    "a handler that is not": (["--handler-name", "GeneralPretrainHandeler"], 2, "did you mean GeneralPretrainHandler"),
    "a tokenizer type that is not": (["--tokenizer-type", "GPT2BPETokenizer"], 2, "tokenizer_type=GPT2BPETokenizer"),
    "a layout that is not written": (["--dataset-impl", "lazy"], 2, "dataset_impl=lazy"),
    "no workers": (["--workers", 0], 2, "workers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_refused(tmp_path: Path, tokenizer_folder: Path, case: str) -> None:
    flags, status, complaint = BAD_FLAGS[case]
    done = call(
        "asd-data", "preprocess", "--input", write_json_lines(tmp_path / "x.jsonl", TEXTS[:2]), "--output-prefix",
        tmp_path / "out", "--tokenizer-name-or-path", tokenizer_folder, *flags,
    )  # fmt: skip
    assert done.status == status
    assert complaint in done.complaint
    assert not list(tmp_path.glob("out*"))


def test_an_existing_output_is_not_replaced(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = write_json_lines(tmp_path / "x.jsonl", TEXTS[:5])
    before = bytes_of(preprocess(tmp_path, tokenizer_folder, source))
    write_json_lines(source, TEXTS[:9])
    done = call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out",
        "--tokenizer-name-or-path", tokenizer_folder,
    )  # fmt: skip
    assert "exists; give --overwrite" in done.complaint
    assert bytes_of(tmp_path / "out_text_document") == before


def test_training_a_tokenizer_twice_gives_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    for name in ("a", "b"):
        done = call(
            "asd-data", "train-tokenizer", "--input", corpus, "--output-dir", tmp_path / name, "--vocab-size", 400,
        )  # fmt: skip
        assert done.status == 0, done.stderr
    assert (tmp_path / "a" / "tokenizer.model").read_bytes() == (
        tmp_path / "b" / "tokenizer.model"
    ).read_bytes()
    again = call(
        "asd-data", "train-tokenizer", "--input", corpus, "--output-dir", tmp_path / "a", "--vocab-size", 400,
    )  # fmt: skip
    assert "exists; give --overwrite" in again.complaint
    large = call(
        "asd-data", "train-tokenizer", "--input", corpus, "--output-dir", tmp_path / "c", "--vocab-size", 90_000,
    )  # fmt: skip
    assert large.status == 1
    assert "is too large for this text; give at most" in large.complaint
    assert not (tmp_path / "c").exists()
