"""Packed sequences, merged datasets, and what inspect shows of them."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ascendspeed_data.dataset import Dataset, open_dataset
from ascendspeed_data.errors import DataError
from ascendspeed_data.preprocessing.packing import best_fit
from support.commands import call
from support.corpus import make_texts

TEXTS = make_texts(600, seed=6)
SEQ_LENGTH = 900


def records(count: int = 300) -> list[dict[str, Any]]:
    """Some answers are longer than a pack, and one question is."""
    rows = [
        {"instruction": one, "output": two}
        for one, two in zip(TEXTS[:count], TEXTS[300:][:count], strict=True)
    ]
    for number in (7, 100, 290):
        rows[number]["output"] = " ".join([rows[number]["output"]] * 30)
    rows[200]["instruction"] = " ".join([rows[200]["instruction"]] * 60)
    return rows


def preprocess(folder: Path, name: str, tokenizer: Path, rows: list[dict[str, Any]], *flags: object) -> Any:
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", folder / name, "--tokenizer-name-or-path",
        tokenizer, "--handler-name", "GeneralInstructionHandler", *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The same samples, one by one and packed."""
    folder = tmp_path_factory.mktemp("packing")
    assert preprocess(folder, "plain", tokenizer_folder, records()).status == 0
    done = preprocess(folder, "packed", tokenizer_folder, records(), "--pack", "--seq-length", SEQ_LENGTH)
    assert done.status == 0, done.stderr
    assert f"packed to {SEQ_LENGTH}: " in done.stderr
    return folder


def samples(dataset: Dataset) -> list[tuple[list[int], list[int]]]:
    return [
        (dataset.arrays["input_ids"][n].tolist(), dataset.arrays["labels"][n].tolist())
        for n in range(len(dataset.ids))
    ]


def test_packs_have_whole_samples_and_their_boundaries(folder: Path) -> None:
    plain, packed = open_dataset(folder / "plain"), open_dataset(folder / "packed")
    wanted = []
    cut = dropped = 0
    for ids, labels in samples(plain):
        short_labels = [-100, *labels[1:SEQ_LENGTH]]
        if all(label == -100 for label in short_labels):
            dropped += 1
            continue
        cut += len(ids) > SEQ_LENGTH
        wanted.append((ids[:SEQ_LENGTH], short_labels))
    assert (cut, dropped) == (3, 1)
    assert sorted(samples(packed)) == sorted(wanted)
    documents = np.asarray(packed.ids.documents)
    tokens = [int(packed.ids.lengths[a:b].sum()) for a, b in pairwise(documents)]
    assert max(tokens) <= SEQ_LENGTH
    assert np.diff(documents).max() >= 3
    manifest = packed.manifest
    assert manifest is not None
    assert manifest.pack is not None
    assert (manifest.num_documents, manifest.num_sequences) == (len(tokens), len(wanted))
    assert (manifest.pack.num_cut_samples, manifest.pack.num_dropped_samples) == (cut, dropped)
    assert manifest.pack.padding_share == pytest.approx(1 - sum(tokens) / (len(tokens) * SEQ_LENGTH))
    assert call("asd-data", "verify", folder / "packed").status == 0
    # Samples of a pack lie one behind the other in the .bin, so a reader takes them in one piece.
    whole = np.fromfile(folder / "packed_packed_input_ids_document.bin", np.int32)
    assert whole.tolist() == [token for ids, _ in samples(packed) for token in ids]


def test_the_reader_in_the_documentation_reads_packs(folder: Path) -> None:
    document = Path(__file__).parents[2] / "docs" / "data-formats.md"
    (program,) = re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    packed = open_dataset(folder / "packed")
    most = int(np.diff(packed.ids.documents).argmax())
    read = names["read_pack"](str(folder / "packed"), most)
    start, end = (int(edge) for edge in packed.ids.documents[most : most + 2])
    assert end - start > 1
    assert len(read["cu_seqlens"]) == end - start + 1
    for number, (begin, finish) in enumerate(pairwise(read["cu_seqlens"].tolist())):
        assert read["input_ids"][begin:finish].tolist() == packed.ids[start + number].tolist()
        assert read["labels"][begin] == -100
    assert read["cu_seqlens"][-1] == len(read["attention_mask"]) == len(read["labels"])


def test_packs_keep_the_order_of_the_input() -> None:
    lengths = np.random.default_rng(3).integers(1, 200, 2000)
    packs = best_fit(lengths, 256)
    assert sorted(item for pack in packs for item in pack) == list(range(2000))
    assert all(sum(lengths[pack]) <= 256 for pack in packs)
    assert all(pack == sorted(pack) for pack in packs)
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)
    # No algorithm needs fewer packs than the tokens fill; best fit decreasing comes close.
    assert len(packs) <= -(-int(lengths.sum()) // 256) * 1.03


def test_a_merged_dataset_concatenates_its_inputs(folder: Path, tmp_path: Path, dataset: Path) -> None:
    for name in ("plain", "packed"):
        done = call("asd-data", "merge", folder / name, folder / name, "--output-prefix", tmp_path / name)
        assert done.status == 0, done.stderr
        once, twice = open_dataset(folder / name), open_dataset(tmp_path / name)
        assert samples(twice) == samples(once) * 2
        assert np.array_equal(np.diff(twice.ids.documents), np.tile(np.diff(once.ids.documents), 2))
        assert once.manifest is not None
        assert twice.manifest is not None
        assert twice.manifest.num_trained_tokens == 2 * once.manifest.num_trained_tokens
        assert twice.manifest.unigram_entropy_nats == pytest.approx(once.manifest.unigram_entropy_nats)
        assert call("asd-data", "verify", tmp_path / name).status == 0
    mixed = call("asd-data", "merge", folder / "plain", dataset, "--output-prefix", tmp_path / "x")
    assert "one has samples with labels, the other plain text" in mixed.complaint
    packs = call("asd-data", "merge", folder / "plain", folder / "packed", "--output-prefix", tmp_path / "x")
    assert "has seq_length=900" in packs.complaint
    exists = call("asd-data", "merge", dataset, dataset, "--output-prefix", dataset)
    assert exists.status == 2
    assert "is one of the datasets to merge" in exists.complaint
    assert not list(tmp_path.glob("x*"))


def test_datasets_of_different_tokenizers_are_not_merged(dataset: Path, tmp_path: Path, corpus: Path) -> None:
    done = call(
        "asd-data", "train-tokenizer", "--input", corpus, "--output-dir", tmp_path / "t", "--vocab-size", 380
    )
    assert done.status == 0
    done = call(
        "asd-data", "preprocess", "--input", corpus, "--output-prefix", tmp_path / "other",
        "--tokenizer-name-or-path", tmp_path / "t",
    )  # fmt: skip
    other = tmp_path / "other_text_document"
    merged = call("asd-data", "merge", dataset, other, "--output-prefix", tmp_path / "x")
    assert merged.status == 1
    assert "were made with different tokenizers" in merged.complaint
    blended = call("asd-data", "inspect", 0.5, dataset, 0.5, other)
    assert blended.status == 1
    assert "were made with different tokenizers" in blended.complaint


def test_unsuitable_blends_are_refused(dataset: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{dataset}{suffix}", tmp_path / f"copy{suffix}")
    rows = json.loads(call("asd-data", "inspect", 3, dataset, 1, tmp_path / "copy", "--json").stdout)
    assert [row["share"] for row in rows] == [0.75, 0.25]
    assert [row["epochs"] for row in rows] == [1.5, 0.5]
    assert "75.0%" in call("asd-data", "inspect", 3, dataset, 1, tmp_path / "copy").stdout
    for words in (
        (dataset, dataset),
        (0.5, dataset, 0.5),
        (-1, dataset, 1, dataset),
        ("nan", dataset, 1, dataset),
    ):
        bad = call("asd-data", "inspect", "--", *words)
        assert bad.status == 2
        assert "neither one prefix nor pairs" in bad.complaint
    missing = call("asd-data", "inspect", 1, dataset, 1, tmp_path / "nothing")
    assert missing.status == 1
    assert "nothing.idx does not exist" in missing.complaint


def test_inspect_shows_the_trained_tokens(folder: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    command = ["asd-data", "inspect", folder / "plain", "--documents", 1, "--first", 4, "--max-tokens", 500]
    shown = json.loads(call(*command, "--tokenizer-name-or-path", tokenizer_folder, "--json").stdout)[
        "documents"
    ][0]
    made = open_dataset(folder / "plain")
    assert shown["document"] == 4
    assert shown["ids"] == made.ids[4].tolist()
    assert shown["trained"] == made.trained(4).astype(int).tolist()
    assert records()[4]["output"].split()[0] in shown["text"]
    text = call(*command, "--tokenizer-name-or-path", tokenizer_folder, "--color").stdout
    start = shown["trained"].index(1)
    assert f"\x1b[2m{shown['pieces'][start - 1]}\x1b[0m\x1b[32m{shown['pieces'][start]}\x1b[0m" in text
    assert f"{start}-{len(shown['ids']) - 1}" in text
    pytest.importorskip("matplotlib")
    picture = tmp_path / "lengths.png"
    stats = call(
        "asd-data", "inspect", folder / "packed", "--stats", "--png", picture, "--documents", 0
    ).stdout
    assert "sequences" in stats
    assert "tokens are trained" in stats
    assert picture.read_bytes().startswith(b"\x89PNG")
    beyond = call("asd-data", "inspect", folder / "plain", "--first", 999)
    assert beyond.status == 2


def test_pretraining_refuses_a_dataset_of_samples(folder: Path) -> None:
    from ascendspeed_core.config.training import DataConfig
    from ascendspeed_core.data.gpt_dataset import check_data

    config = DataConfig(data_path=(str(folder / "plain_packed_input_ids_document"),), seq_length=16)
    with pytest.raises(DataError, match="holds samples with labels"):
        check_data(config, (1, 0, 0))
