"""A sample index and a run belong to the content of their files, and settings to what they mean."""

import random
import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.split import parse_split, split_edges
from ascendspeed_core.config.training import DataConfig, PretrainConfig
from ascendspeed_core.data.content import BLOCK_BYTES, BLOCKS, dataset_content, describe_change
from ascendspeed_core.data.gpt_dataset import GPTBatchLoader, check_data, samples_of_epochs
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.data_order import as_it_began, check_data_order, data_order
from ascendspeed_data.errors import AscendSpeedError, DataError
from ascendspeed_data.indexed import IndexedDatasetWriter
from support.corpus import write_dataset
from support.tables import ReportTables

ALONE = ParallelMesh(Device("cpu"), Layout())
VOCABULARY, LENGTH, SEED = 97, 8, 5
TITLE, HEADER = "What a run is resumed by, inputs drawn", ("inputs", "tried", "disagreements")

Documents = list[list[int]]


def write(prefix: Path, documents: Documents) -> Path:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        ids = np.concatenate([np.asarray(document, np.uint16) for document in documents])
        writer.add_documents(list(map(len, documents)), ids)
        writer.finish()
    return prefix


def drawn_documents(draw: random.Random, count: int) -> Documents:
    return [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 12))] for _ in range(count)]


def loaded(config: DataConfig, samples: int, held_out: int = 0) -> GPTBatchLoader:
    return GPTBatchLoader(config, SEED, (samples, held_out, 0), VOCABULARY, None, ALONE)


def tokens_of(config: DataConfig, samples: int = 20) -> torch.Tensor:
    return loaded(config, samples).micro_batches(0, (samples,))[0].tokens


def changed(draw: random.Random, documents: Documents) -> Documents:
    """Documents with one small change."""
    made = [list(document) for document in documents]
    place = draw.randrange(len(made))
    kinds = ("id", "append", "longer", "before", "drop", "swap")
    kind = draw.choice(kinds if len(made) > 10 else kinds[:4])
    if kind == "id":
        made[place][-1] = (made[place][-1] + 1) % VOCABULARY
    elif kind == "append":
        made += drawn_documents(draw, draw.randint(1, 40))
    elif kind == "drop":
        made = made[: len(made) - draw.randint(1, 10)]
    elif kind == "swap":
        made[0], made[-1] = [*made[-1], 1], made[0]
    elif kind == "longer":
        made[place].append(3)
    else:
        made.insert(0, [4])
    return made


def test_an_index_is_of_the_content_of_its_files(tmp_path: Path, report: ReportTables) -> None:
    """Files made anew under one name, in all small ways, with one cache for all: as with an empty cache."""
    draw, tried, wrong = random.Random(8), 25, 0
    documents = drawn_documents(draw, 30)
    for number in range(tried):
        prefix = write(tmp_path / "data", documents)
        given: dict[str, Any] = {"data_path": (str(prefix),), "seq_length": LENGTH, "split": "1,0,0"}
        again = tokens_of(DataConfig(**given, data_cache_path=tmp_path / "cache"))
        fresh = tokens_of(DataConfig(**given, data_cache_path=tmp_path / f"empty-{number}"))
        wrong += not torch.equal(again, fresh)
        documents = changed(draw, documents)
    report.add(TITLE, HEADER, "data made anew, one cache", tried, wrong)
    assert not wrong


def test_the_index_beside_the_data_is_of_its_content(tmp_path: Path) -> None:
    draw = random.Random(9)
    prefix = write(tmp_path / "data", drawn_documents(draw, 60))
    config = DataConfig(data_path=(str(prefix),), seq_length=LENGTH, split="1,0,0")
    first = tokens_of(config)
    assert torch.equal(tokens_of(config), first)
    # Fewer records than the index that lies there speaks of.
    write(prefix, drawn_documents(draw, 5))
    fewer = tokens_of(config)
    shutil.rmtree(tmp_path / "data")
    assert torch.equal(tokens_of(config), fewer)


def test_content_is_the_same_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: ReportTables
) -> None:
    draw, tried, wrong = random.Random(10), 100, 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    for number in range(tried):
        documents = drawn_documents(draw, draw.randint(1, 20))
        prefix = write(tmp_path / f"a{number}", documents)
        content = dataset_content(str(prefix))
        moved = write(tmp_path / f"moved{number}", documents)
        for other in (f"a{number}", f"./a{number}", f"link/a{number}", f"link/./a{number}", str(moved)):
            wrong += describe_change(content, dataset_content(other)) is not None
        edited = write(tmp_path / f"edited{number}", changed(draw, documents))
        wrong += describe_change(content, dataset_content(str(edited))) is None
    report.add(TITLE, HEADER, "data under other paths, and changed data", 6 * tried, wrong)
    assert not wrong


def test_what_changed_is_named(tmp_path: Path) -> None:
    before = dataset_content(str(write(tmp_path / "a", [[1, 2], [3]])))
    assert describe_change(before, dataset_content(str(write(tmp_path / "b", [[1, 2], [3], [4]])))) == (
        "other documents or lengths"
    )
    assert describe_change(before, dataset_content(str(write(tmp_path / "c", [[1, 2], [4]])))) == (
        "other tokens"
    )


def test_a_long_file_is_looked_at_in_places(tmp_path: Path) -> None:
    """Beginning, end and regular blocks count; the manifest's checksum counts for what is between."""
    size = 3 * BLOCKS * BLOCK_BYTES
    prefix = write(tmp_path / "long", [[0] * (size // 2)])
    before = dataset_content(str(prefix))
    for offset in (0, size - 2, (size - BLOCK_BYTES) * 7 // (BLOCKS - 1)):
        with Path(f"{prefix}.bin").open("r+b") as file:
            file.seek(offset)
            file.write(b"\1\0")
        assert describe_change(before, dataset_content(str(prefix))) == "other tokens"
        write(prefix, [[0] * (size // 2)])
    assert describe_change(before, dataset_content(str(prefix))) is None
    recorded = {"": {**before[""], "sha256": "a"}}
    assert (
        describe_change(recorded, {"": {**before[""], "sha256": "b"}}) == "another checksum in its manifest"
    )
    assert describe_change(recorded, before) is None


def run_of(words: Sequence[str], **data: Any) -> PretrainConfig:
    given = {"model_config_file": "m.json", "data_path": tuple(words), "seq_length": LENGTH, "train_iters": 1}
    return load_config(PretrainConfig, None, given | data)


def complaint(before: PretrainConfig, now: PretrainConfig) -> str | None:
    try:
        check_data_order("run", {}, data_order(before, {}), data_order(now, {}))
    except AscendSpeedError as error:
        return str(error)
    return None


def spelled(draw: random.Random, value: Fraction) -> str:
    """A decimal number in one of its spellings."""
    digits = f"{float(value):.10f}"
    return draw.choice(
        (digits, digits.rstrip("0").rstrip("."), "0" + digits, f"{float(value):.12e}", repr(float(value)))
    )


def test_a_blend_is_what_its_weights_mean(tmp_path: Path, report: ReportTables) -> None:
    draw, tried, wrong = random.Random(11), 150, 0
    prefixes = [str(write(tmp_path / name, drawn_documents(draw, 20))) for name in "abc"]
    for _ in range(tried):
        parts = draw.sample(prefixes, draw.randint(2, 3))
        weights = [Fraction(draw.randint(1, 99), 100) for _ in parts]
        factor = draw.choice((Fraction(1), Fraction(2), Fraction(10), Fraction(3)))
        first = [word for pair in zip(map(str, map(float, weights)), parts, strict=True) for word in pair]
        same = [spelled(draw, weight * factor) for weight in weights]
        pairs = list(zip(same, parts, strict=True))
        draw.shuffle(pairs)
        second = [word for pair in pairs for word in pair]
        began, goes_on = run_of(first), run_of(second)
        wrong += complaint(began, goes_on) is not None
        # What is read is what the run began with, to the last bit.
        used, order = as_it_began(data_order(began, {}), goes_on.data, data_order(goes_on, {}))
        wrong += used.blend() != began.data.blend()
        wrong += order != data_order(began, {})
        other = list(weights)
        other[0] += Fraction(draw.randint(1, 9), 1000)
        third = [word for pair in zip(map(str, map(float, other)), parts, strict=True) for word in pair]
        wrong += "the blend was" not in str(complaint(began, run_of(third)))
    report.add(TITLE, HEADER, "blends in other spellings and sequences, and other blends", 3 * tried, wrong)
    assert not wrong


def test_a_blend_of_one_is_its_only_part(tmp_path: Path) -> None:
    prefix = str(write(tmp_path / "a", [[1, 2, 3]]))
    alone, weighted = run_of([prefix]), run_of(["0.3", prefix])
    assert complaint(alone, weighted) is None
    assert complaint(weighted, alone) is None
    for began, now in ((weighted, alone), (alone, weighted)):
        used, order = as_it_began(data_order(began, {}), now.data, data_order(now, {}))
        assert used.data_path == began.data.data_path
        assert order == data_order(began, {})


def test_the_same_data_twice_goes_by_weight(tmp_path: Path) -> None:
    a, b = (str(write(tmp_path / name, [[1, 2, 3]])) for name in "ab")
    began, now = run_of(["0.3", a, "0.7", b]), run_of(["7", a, "3", b])
    assert complaint(began, now) is None
    used, _ = as_it_began(data_order(began, {}), now.data, data_order(now, {}))
    assert used.blend() == ([b, a], [0.3, 0.7])


def test_held_out_data_keeps_its_sequence(tmp_path: Path) -> None:
    draw = random.Random(17)
    a, b, c = (str(write(tmp_path / name, drawn_documents(draw, 20))) for name in "abc")
    given: dict[str, Any] = {"train_data_path": (a,), "eval_iters": 1}
    began = run_of([], valid_data_path=("1", b, "2", c), **given)
    now = run_of([], valid_data_path=("4", c, "2", b), **given)
    assert complaint(began, now) is None
    used, order = as_it_began(data_order(began, {}), now.data, data_order(now, {}))
    assert used.blend(1) == began.data.blend(1)
    assert order == data_order(began, {})


def test_other_settings_of_a_run_that_goes_on(tmp_path: Path) -> None:
    draw = random.Random(12)
    a, b = (str(write(tmp_path / name, drawn_documents(draw, 20))) for name in "ab")
    began = run_of([a], split="90,10,0")
    assert complaint(began, run_of([a], split="0.9/0.10/0.")) is None
    assert complaint(run_of([a], split="7,0,0"), run_of([], train_data_path=(a,))) is None
    assert "split was 90,10,0, is 80,20,0" in str(complaint(began, run_of([a], split="80,20,0")))
    for name in ("reset_attention_mask", "reset_position_ids", "eod_mask_loss", "no_shuffle"):
        assert f"{name} was False, is True" in str(
            complaint(began, run_of([a], split="90,10,0", **{name: True}))
        )
    assert "the data b is not what it was: other documents" in str(
        complaint(began, run_of([b], split="9,1,0"))
    )
    assert "the data was a, is 1 a 2 b" in str(complaint(began, run_of(["1", a, "2", b], split="9,1,0")))
    # What release 0.1.0 kept: names and weights as they were typed, and the options elsewhere.
    old = {"data": ["0.5", "a", "0.50", "b"], "split": "90,10,0", "seq_length": LENGTH, "seed": 1234}
    now = data_order(run_of(["1", a, "1", b], split="9,1,0"), {})
    check_data_order("run", {"data": {"eod_mask_loss": False}}, old, now)
    with pytest.raises(AscendSpeedError, match="eod_mask_loss was True, is False"):
        check_data_order("run", {"data": {"eod_mask_loss": True}}, old, now)
    with pytest.raises(AscendSpeedError, match=r"the blend was 0\.9 a 0\.1 b, is 1 a 1 b"):
        check_data_order("run", {}, old | {"data": ["0.9", "a", "0.1", "b"]}, now)
    with pytest.raises(AscendSpeedError, match="it was c"):
        check_data_order("run", {}, old | {"data": ["1", "c", "1", "b"]}, now)


def test_held_out_data_of_its_own_may_change_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(13)
    a, b, c = (str(write(tmp_path / name, drawn_documents(draw, 20))) for name in "abc")
    given: dict[str, Any] = {"train_data_path": (a,), "eval_iters": 1}
    began = run_of([], valid_data_path=(b,), **given)
    assert complaint(began, began) is None
    assert not capsys.readouterr().err
    assert complaint(began, run_of([], valid_data_path=(c,), **given)) is None
    assert "validation: the data c is not what it was" in capsys.readouterr().err
    assert "the data c is not" in str(
        complaint(began, run_of([], valid_data_path=(b,), **given | {"train_data_path": (c,)}))
    )


ODD_SPLITS = [
    "0,0,0", "-1,1,0", "90,abc5,5", "nan,1,1", "inf,1,0", "1,2", "1,2,3,4", "", ",,", "1,,1", "1e2,1,1", "1_0,1,1",
    "²,1,1", "0.0,0,.0", "1" * 400 + ",1,1", "1 2,3,4", ".,1,1", "٣,1,1",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD_SPLITS)
def test_odd_splits_are_one_line_that_names_the_rule(text: str) -> None:
    with pytest.raises(ValueError, match="split=") as raised:
        parse_split(text)
    assert "--split 969,30,1" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_splits_are_megatron_cores_own(report: ReportTables) -> None:
    draw, tried, accepted, wrong = random.Random(14), 3000, 0, 0
    for _ in range(tried):
        parts = [
            draw.choice(("0", "1", f"{draw.randint(0, 999)}", f"{draw.random():.3f}", "-1", "x", "nan", ""))
            for _ in range(3)
        ]
        text = draw.choice((",", ",", "/", ", ")).join(parts)
        try:
            parse_split(text)
        except ValueError:
            continue
        accepted += 1
        count = draw.randint(0, 200)
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(text))
        edges = split_edges(text, count)
        for number, part in enumerate(matrix):
            theirs = [round(edge * float(count)) for edge in part] if part else None
            ours = edges[number : number + 2]
            wrong += ours != theirs if theirs else ours[0] != ours[1]
    report.add(TITLE, HEADER, f"splits ({accepted} accepted)", tried, wrong)
    assert accepted > 300
    assert not wrong


def test_many_parts_and_few_samples_are_no_index_error(tmp_path: Path, report: ReportTables) -> None:
    """megatron-core builds for each part its share and 0.5 %, and may draw more."""
    draw, tried = random.Random(15), 20
    for number in range(tried):
        parts = draw.randint(2, 12)
        words: list[str] = []
        for part in range(parts):
            prefix = write(tmp_path / f"{number}-{part}", drawn_documents(draw, draw.randint(1, 4)))
            words += [f"{draw.random() ** 6 + 1e-6:.7f}", str(prefix)]
        config = DataConfig(
            data_path=tuple(words), seq_length=2, split="1,0,0", data_cache_path=tmp_path / f"cache{number}"
        )
        count = draw.randint(1, 30)
        assert tokens_of(config, count).shape == (count, 2)
    report.add(TITLE, HEADER, "blends of many parts, few samples", tried, 0)


def test_files_without_documents_are_refused(tmp_path: Path) -> None:
    with IndexedDatasetWriter(tmp_path / "none", np.uint16) as writer:
        writer.finish()
    with pytest.raises(DataError, match="holds no document, so nothing for training"):
        loaded(DataConfig(data_path=(str(tmp_path / "none"),), seq_length=LENGTH), 4)


def test_less_than_one_sample_is_repeated_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write(tmp_path / "short", [[1, 2, 3], [4]])
    config = DataConfig(
        data_path=(str(prefix),), seq_length=32, split="1,0,0", data_cache_path=tmp_path / "cache"
    )
    check_data(config, (5, 0, 0))
    assert "its 4 training tokens are less than one sample (seq_length=32" in capsys.readouterr().err
    tokens = tokens_of(config, 5)
    assert tokens.shape == (5, 32)
    assert set(tokens.flatten().tolist()) == {1, 2, 3, 4}
    with pytest.raises(
        DataError, match="num_train_epochs=1 of 4 training tokens fill no sample of seq_length=32"
    ):
        samples_of_epochs(config, 1)


def test_samples_in_the_sequence_of_the_file(tmp_path: Path, report: ReportTables) -> None:
    """They are the joined documents, cut; of a blend, those of each part, one after the other."""
    draw, tried, wrong = random.Random(18), 12, 0
    for number in range(tried):
        texts = [drawn_documents(draw, draw.randint(1, 20)) for _ in "ab"]
        a, b = (
            str(write(tmp_path / f"{name}{number}", part)) for name, part in zip("ab", texts, strict=True)
        )
        given: dict[str, Any] = {"seq_length": LENGTH, "split": "1,0,0", "no_shuffle": True}
        samples = draw.randint(1, 30)
        streams = [
            torch.tensor([id_ for text in part for id_ in text]).repeat(samples * LENGTH + 1)
            for part in texts
        ]
        (batch,) = loaded(DataConfig(data_path=(a,), **given), samples).micro_batches(0, (samples,))
        whole = streams[0][: samples * LENGTH + 1]
        wrong += not torch.equal(batch.tokens.flatten(), whole[:-1])
        wrong += not torch.equal(batch.labels.flatten(), whole[1:])
        blend = DataConfig(data_path=("0.4", a, "0.6", b), data_cache_path=tmp_path / "cache", **given)
        data = loaded(blend, samples)
        (batch,) = data.micro_batches(0, (samples,))
        for part, stream in enumerate(streams):
            mine = batch.tokens[torch.from_numpy(data.train.dataset_index[:samples] == part)]
            wrong += not torch.equal(mine.flatten(), stream[: mine.numel()])
    report.add(TITLE, HEADER, "samples in the sequence of the file", 3 * tried, wrong)
    assert not wrong


def test_each_split_can_have_data_of_its_own(tmp_path: Path) -> None:
    """The samples of a prefix, or of a blend, are those of a split that gives it everything."""
    draw = random.Random(16)
    a, b, c = (str(write(tmp_path / name, drawn_documents(draw, 40))) for name in "abc")
    for words in ((a,), ("0.3", a, "0.7", c)):
        own = DataConfig(
            train_data_path=words, valid_data_path=(b,), test_data_path=(c,), seq_length=LENGTH,
            data_cache_path=tmp_path / "cache",
        )  # fmt: skip
        data = GPTBatchLoader(own, SEED, (20, 6, 4), VOCABULARY, None, ALONE)
        whole = DataConfig(
            data_path=words, split="1,0,0", seq_length=LENGTH, data_cache_path=tmp_path / "cache"
        )
        assert torch.equal(data.micro_batches(0, (20,))[0].tokens, tokens_of(whole))
        held_out = DataConfig(
            data_path=(b,), split="0,1,0", seq_length=LENGTH, data_cache_path=tmp_path / "cache"
        )
        expected = GPTBatchLoader(held_out, SEED, (0, 6, 0), VOCABULARY, None, ALONE).validation_batches(
            0, (6,)
        )
        assert torch.equal(data.validation_batches(0, (6,))[0].tokens, expected[0].tokens)
        assert data.test_batches((4,))[0].tokens.shape == (4, LENGTH)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "data_path is missing; give --data-path, or --train-data-path"),
        ({"data_path": ("a",), "train_data_path": ("b",)}, "data_path and train_data_path were both given"),
        ({"data_path": ("a",), "valid_data_path": ("b",)}, "data_path and valid_data_path were both given"),
        ({"valid_data_path": ("b",)}, "valid_data_path was given without train_data_path"),
        ({"train_data_path": ("b",), "split": "1,0,0"}, "beside train_data_path leave --split out"),
        ({"train_data_path": ("1", "b", "2")}, "train_data_path=1 b 2 is neither one prefix nor pairs"),
        ({"data_path": ("1e308", "a", "1e308", "b")}, "neither one prefix nor pairs of a positive weight"),
    ],
)  # fmt: skip
def test_paths_that_contradict(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(seq_length=8, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"valid_data_path": ("b",)}, "valid_data_path is measured by nothing with eval_iters=0"),
        ({"test_data_path": ("b",)}, "test_data_path is measured by nothing with eval_iters=0"),
        ({"eval_iters": 2}, "eval_iters=2 has nothing to measure beside train_data_path"),
        ({"num_train_epochs": 2.0}, "train_iters=1 and num_train_epochs=2.0 were both given"),
        ({"train_iters": 0, "num_train_epochs": 0.0}, "num_train_epochs=0.0"),
        ({"train_iters": 0, "num_train_epochs": float("inf")}, "num_train_epochs=inf"),
        ({"train_iters": 0}, "give --train-iters, --train-samples or --num-train-epochs"),
    ],
)
def test_lengths_and_measures_that_contradict(given: dict[str, Any], message: str) -> None:
    with pytest.raises(AscendSpeedError, match=message):
        run_of([], train_data_path=("a",), **given)


def test_write_dataset_is_read_by_both_names(tmp_path: Path) -> None:
    """A prefix and a link to its files are one data set to a run."""
    prefix = write_dataset(tmp_path / "data", VOCABULARY)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"link{suffix}").symlink_to(f"{prefix}{suffix}")
    assert complaint(run_of([str(prefix)]), run_of([str(tmp_path / "link")])) is None
