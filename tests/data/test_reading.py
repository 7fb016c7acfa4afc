"""Reading is the same from whatever place one goes on, in whatever format, and holds little."""

import csv
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import DataError
from ascendspeed_data.reading.records import records_of_shard
from ascendspeed_data.reading.shards import shards_of_file
from support.commands import call
from support.corpus import make_texts

RECORDS = [{"text": text, "id": str(number)} for number, text in enumerate(make_texts(700, seed=8))]
RECORDS[3]["text"] = 'quoted "text", with a\nnew line and \u2028 a separator'


def lines() -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()


def frames() -> bytes:
    """Two zstd frames, as a file to which somebody appended."""
    content = lines()
    return zstandard.compress(content[:20_000]) + zstandard.compress(content[20_000:])


def as_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "id"])
        writer.writeheader()
        writer.writerows(RECORDS)


def as_arrow(path: Path) -> None:
    table = pyarrow.Table.from_pylist(RECORDS)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=150)


FORMATS: dict[str, Callable[[Path], Any]] = {
    "x.jsonl": lambda p: p.write_bytes(lines()),
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + lines()),
    "no-end.jsonl": lambda p: p.write_bytes(lines().rstrip(b"\n")),
    "x.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines())),
    "x.jsonl.zst": lambda p: p.write_bytes(frames()),
    "x.json": lambda p: p.write_text(json.dumps(RECORDS, ensure_ascii=False, indent=1)),
    "x.json.gz": lambda p: p.write_bytes(gzip.compress(json.dumps(RECORDS).encode())),
    "x.csv": as_csv,
    "x.csv.zst": lambda p: (as_csv(p), p.write_bytes(zstandard.compress(p.read_bytes()))),
    "x.parquet": lambda p: pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(RECORDS), p, row_group_size=90
    ),
    "x.arrow": as_arrow,
}


@pytest.mark.parametrize("name", FORMATS)
def test_reading_resumes_at_every_shard(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    FORMATS[name](path)
    shards = list(shards_of_file(path, 0, 0, 2000))
    assert len(shards) > 4
    assert [record for shard in shards for _, record in records_of_shard(shard)] == RECORDS
    for number in random.Random(0).sample(range(1, len(shards)), 4):
        before = [record for shard in shards[:number] for _, record in records_of_shard(shard)]
        again = [
            record
            for shard in shards_of_file(path, 0, shards[number - 1].end, 700)
            for _, record in records_of_shard(shard)
        ]
        assert before + again == RECORDS


def test_a_json_list_is_read_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ascendspeed_data.reading import shards as module

    largest = 0
    original = module._TextWindow.more

    def more(self: Any) -> bool:
        nonlocal largest
        result = original(self)
        largest = max(largest, len(self.buffer))
        return result

    monkeypatch.setattr(module._TextWindow, "more", more)
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": "word " * 400}] * 10_000))
    assert path.stat().st_size > 20_000_000
    assert sum(len(list(records_of_shard(shard))) for shard in shards_of_file(path, 0, 0, 1 << 20)) == 10_000
    assert largest < 5_000_000


def test_a_compressed_file_that_became_shorter_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(lines()))
    with pytest.raises(DataError, match="has become shorter"):
        list(shards_of_file(path, 0, 10_000_000, 2000))


@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_reads_a_local_folder(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    """The config of the README of 2023 with its JSON mended, on a folder laid out as on the hub."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "wikipedia"
    (folder / "20220301.en").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(RECORDS)
    pyarrow.parquet.write_table(table.slice(0, 400), folder / "20220301.en" / "train-00000-of-00002.parquet")
    pyarrow.parquet.write_table(table.slice(400), folder / "20220301.en" / "train-00001-of-00002.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: 20220301.en\n  data_files:\n  - split: train\n"
        "    path: 20220301.en/train-*\n---\n"
    )
    params = tmp_path / "hf_config_json.json"
    params.write_text(
        json.dumps({"path": str(folder), "name": "20220301.en", "streaming": True, "split": "train"})
    )
    command = [
        "asd-data", "preprocess", "--input", folder, "--hf-datasets-params", params, "--output-prefix",
        tmp_path / "wiki", "--dataset-impl", "mmap", "--tokenizer-type", "PretrainedFromHF",
        "--tokenizer-name-or-path", tokenizer_folder, "--workers", 2, *(["--streaming"] if streaming else []),
    ]  # fmt: skip
    done = call(*command)
    assert done.status == 0, done.stderr
    assert "--input has no effect" in done.stderr
    (tmp_path / "x.jsonl").write_bytes(lines())
    direct = call(
        "asd-data", "preprocess", "--input", tmp_path / "x.jsonl", "--output-prefix", tmp_path / "direct",
        "--tokenizer-name-or-path", tokenizer_folder,
    )  # fmt: skip
    assert direct.status == 0, direct.stderr
    for suffix in (".bin", ".idx"):
        one, two = (tmp_path / f"{name}_text_document{suffix}" for name in ("wiki", "direct"))
        assert one.read_bytes() == two.read_bytes()
    manifest = open_dataset(tmp_path / "wiki_text_document").manifest
    assert manifest is not None
    assert [record.name for record in manifest.inputs][1:] == [
        "train-00000-of-00002.parquet", "train-00001-of-00002.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"path": "x", "streaming: True}', "is not JSON"),
        ('{"name": "x"}', "is not a JSON object with the key 'path'"),
        ('{"path": "x", "trust_remote_code": true}', "code of a dataset never runs"),
        ('{"path": "./no-such-folder/x"}', "load_dataset failed"),
    ],
)
def test_bad_load_dataset_params_are_reported(
    tmp_path: Path, tokenizer_folder: Path, content: str, complaint: str
) -> None:
    pytest.importorskip("datasets")
    params = tmp_path / "params.json"
    params.write_text(content)
    done = call(
        "asd-data", "preprocess", "--hf-datasets-params", params, "--output-prefix", tmp_path / "out",
        "--tokenizer-name-or-path", tokenizer_folder,
    )  # fmt: skip
    assert done.status == 1
    assert complaint in done.complaint
