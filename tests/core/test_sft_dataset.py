"""Instruction sets: padding, labels, packs whose samples do not see each other, order, and every layout alike."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ascendspeed_core.build import apply_kernels, load_model
from ascendspeed_core.config.compute import ComputeConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.data.padded_dataset import (
    BlendedExamples,
    PaddedBatchLoader,
    TrainingExample,
    check_padded_data,
    collate,
)
from ascendspeed_core.data.sft_dataset import SFT_FORMAT, SftDataset
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.objectives.next_token import masked_sum
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.parallel.cross_entropy import cross_entropy
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights, open_weights
from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import DataError
from ascendspeed_data.indexed import IndexedDatasetWriter
from core.finetune_cases import BATCH, data_config, tune
from core.training_cases import Trained, join_stages
from support.commands import call, run_command
from support.instruction import LENGTH
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

ALONE = ParallelMesh(Device("cpu"), Layout())
VOCABULARY = 400
MODELS = {
    "rotary": {},
    "ALiBi": {"position": "alibi"},
    "sliding window": {"sliding_window": 5},
}


def config(**changes: Any) -> Any:
    return tiny_config(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **changes)


def model_of(dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes: Any) -> Transformer:
    model = load_model(InitialWeights(config(**changes), seed=5), ALONE, dtype)
    apply_kernels(model, ComputeConfig(attention=attention))  # type: ignore[arg-type]
    return model


def rows_of(prefix: Path, length: int = LENGTH) -> SftDataset:
    return SftDataset(open_dataset(prefix), "100,0,0", 0, length)


def losses_by_sample(model: Transformer, row: TrainingExample, length: int) -> dict[tuple[int, ...], float]:
    """The loss of each sample of a row, added up over its learned ids; by the ids of the sample."""
    batch = collate([row], length)
    logits = model(batch.input).logits
    losses = (cross_entropy(logits, batch.labels, VOCABULARY, None) * batch.loss_mask)[0].tolist()
    found, start = {}, 0
    for size in row.lengths:
        found[tuple(row.ids[start : start + size].tolist())] = sum(losses[start : start + size])
        start += size
    return found


def test_collate_pads_and_shifts() -> None:
    one = TrainingExample(np.array([5, 6, 7]), np.array([-100, 6, 7]), (3,))
    pack = TrainingExample(np.array([8, 9, 1, 2, 3]), np.array([-100, 9, -100, -100, 3]), (2, 3))
    got = collate([one, pack], 7)
    assert got.tokens.tolist() == [[5, 6, 7, 0, 0, 0, 0], [8, 9, 1, 2, 3, 0, 0]]
    assert got.labels.tolist() == [[6, 7, 0, 0, 0, 0, 0], [9, 0, 0, 3, 0, 0, 0]]
    assert got.loss_mask.tolist() == [[1, 1, 0, 0, 0, 0, 0], [1, 0, 0, 1, 0, 0, 0]]
    assert got.positions is not None
    assert got.segments is not None
    assert got.positions.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 0, 1, 2, 0, 1]]
    assert got.segments.tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 2, 2]]
    assert collate([one], 4).segments is None


def test_losses_are_those_of_hugging_face(sets: tuple[Path, Path], tmp_path: Path) -> None:
    theirs = save_hugging_face(config(), tmp_path / "hf").double()
    model = load_model(open_weights(tmp_path / "hf"), ALONE, torch.float64)
    rows = rows_of(sets[0])
    for number in range(0, len(rows), 7):
        row = rows[number]
        want = theirs(input_ids=torch.tensor(row.ids)[None], labels=torch.tensor(row.labels)[None]).loss
        # Hugging Face takes its mean in fp32.
        mean = losses_by_sample(model, row, LENGTH)[tuple(row.ids.tolist())] / (row.labels != -100).sum()
        assert mean == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "triangle", "reference"])
@pytest.mark.parametrize("kind", MODELS)
def test_packed_losses_are_unpacked_losses(
    sets: tuple[Path, Path], report: ReportTables, kind: str, attention: str
) -> None:
    model = model_of(attention=attention, **MODELS[kind])
    alone: dict[tuple[int, ...], float] = {}
    for number in range(len(plain := rows_of(sets[0]))):
        alone |= losses_by_sample(model, plain[number], LENGTH)
    packs, packed = rows_of(sets[1]), {}
    assert len(packs) < len(plain) / 2
    for number in range(len(packs)):
        packed |= losses_by_sample(model, packs[number], LENGTH)
    assert packed.keys() == alone.keys()
    worst = max(abs(packed[ids] - alone[ids]) for ids in alone)
    title = "Packs against single samples: largest difference of a sample's loss, float64"
    report.add(title, ("positions", "attention", "samples", "difference"), kind, attention, len(alone), worst)
    # The order of sums differs with the length of a row.
    assert worst < 1e-9


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_leaks_between_samples(sets: tuple[Path, Path], kind: str) -> None:
    model, packs = model_of(**MODELS[kind]), rows_of(sets[1])
    row = next(packs[n] for n in range(len(packs)) if len(packs[n].lengths) >= 3)
    start, end = row.lengths[0], sum(row.lengths[:2])
    changed = row.ids.copy()
    changed[start:end] = (changed[start:end] + 17) % VOCABULARY

    def logits_and_gradient(ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate([TrainingExample(ids, row.labels, row.lengths)], LENGTH)
        assert model.embedding is not None
        seen: list[torch.Tensor] = []
        handle = model.embedding.register_forward_hook(
            lambda *args: (args[2].retain_grad(), seen.append(args[2]))[0]
        )
        logits = model(batch.input).logits
        handle.remove()
        logits[0, start:end].sum().backward()
        assert seen[0].grad is not None
        return logits[0].detach(), seen[0].grad[0]

    before, gradient = logits_and_gradient(row.ids)
    after, _ = logits_and_gradient(changed)
    inside = torch.zeros(LENGTH, dtype=torch.bool)
    inside[start:end] = True
    assert torch.equal(before[~inside], after[~inside])
    assert (before[inside] != after[inside]).any(-1).all()
    assert not gradient[~inside].any()
    assert gradient[inside].any(-1).all()


def test_each_epoch_sees_each_row_once_in_an_order_of_its_own(sets: tuple[Path, Path]) -> None:
    rows = rows_of(sets[0])
    order = BlendedExamples([rows], None, 11, 3 * len(rows), is_shuffled=True)
    epochs = [[order.locate(n)[1] for n in range(e * len(rows), (e + 1) * len(rows))] for e in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(len(rows)))] * 3
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    again = BlendedExamples([rows], None, 11, 5, is_shuffled=True)
    assert [again.locate(n)[1] for n in range(5)] == epochs[0][:5]
    assert again.digest() == order.digest()
    assert BlendedExamples([rows], None, 12, 5, is_shuffled=True).digest() != order.digest()


def test_a_blend_has_its_shares(sets: tuple[Path, Path]) -> None:
    parts = [rows_of(sets[0]), rows_of(sets[1])]
    order = BlendedExamples(parts, [3.0, 1.0], 11, 400, is_shuffled=True)
    places = [order.locate(n) for n in range(400)]
    assert Counter(part for part, _ in places) == {0: 300, 1: 100}
    for part, rows in enumerate(parts):
        seen = Counter(row for of, row in places if of == part)
        assert max(seen.values()) - min(seen.values()) <= 1
        assert len(seen) == len(rows)


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_ranks_share_the_same_global_batch(sets: tuple[Path, Path], workers: WorkerPool, dp: int) -> None:
    want = workers.run(step_tokens, 1, sets[0], 1)[0]
    parts = workers.run(step_tokens, dp, sets[0], dp)
    assert len({len(row) for rank in parts for row in rank}) == 1, "ranks pad to one length"
    assert sorted(row for rank in parts for row in rank) == sorted(want)


def step_tokens(prefix: Path, dp: int) -> list[list[int]]:
    """The rows of this rank in the third step."""
    mesh = ParallelMesh.create(Device("cpu"), Layout(dp=dp))
    data = PaddedBatchLoader(SFT_FORMAT, data_config(prefix, LENGTH), 3, (100, 0, 0), VOCABULARY, mesh)
    return [row for batch in data.micro_batches(16, (2,) * (4 // dp)) for row in batch.tokens.tolist()]


def test_rows_come_in_the_sequence_of_the_file(sets: tuple[Path, Path]) -> None:
    rows = rows_of(sets[0], LENGTH)
    count = 2 * len(rows) + 1
    config = data_config(sets[0], LENGTH, split="100,0,0", no_shuffle=True)
    data = PaddedBatchLoader(SFT_FORMAT, config, 3, (count, 0, 0), VOCABULARY, ALONE)
    assert data.train is not None
    assert [data.train.locate(number) for number in range(count)] == [
        (0, n % len(rows)) for n in range(count)
    ]


def write_samples(prefix: Path, samples: list[tuple[list[int], list[int], list[int]]]) -> Path:
    """Ids, mask and labels of each sample, without a manifest."""
    for place, name in enumerate(("input_ids", "attention_mask", "labels")):
        with IndexedDatasetWriter(
            prefix.with_name(f"{prefix.name}_packed_{name}_document"), np.int32
        ) as writer:
            arrays = [sample[place] for sample in samples]
            writer.add_documents(list(map(len, arrays)), np.concatenate(arrays).astype(np.int32))
            writer.finish()
    return prefix


def test_long_samples_are_cut_and_useless_ones_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    learned_late, learned_early = [-100] * 8 + [9, 10], [-100, 2, *[-100] * 8]
    ids, mask = list(range(1, 11)), [1] * 10
    prefix = write_samples(
        tmp_path / "long",
        [(ids, mask, learned_late), (ids, mask, learned_early), (ids[:3], mask[:3], ids[:3])],
    )
    rows = rows_of(prefix, 6)
    assert [rows[n].ids.tolist() for n in range(len(rows))] == [[1, 2, 3, 4, 5, 6], [1, 2, 3]]
    check_padded_data(SFT_FORMAT, data_config(prefix, 6, split="100,0,0"), (4, 0, 0))
    assert (
        "2 training samples, seen 2.00 times; 1 lose an end at seq_length=6, 1 longer ones are left out, as nothing to "
        "learn would remain"
    ) in capsys.readouterr().err


def test_padding_of_other_tools_is_taken_off_and_holes_are_refused(tmp_path: Path) -> None:
    prefix = write_samples(
        tmp_path / "padded",
        [([4, 5, 0, 0], [1, 1, 0, 0], [4, 5, -100, -100]), ([4, 5, 6], [1, 0, 1], [4, 5, 6])],
    )
    rows = rows_of(prefix)
    assert rows[0].ids.tolist() == [4, 5]
    # Nothing stands before the first id from which it could be learned.
    assert rows[0].labels.tolist() == [-100, 5]
    with pytest.raises(DataError, match="attention mask of sequence 1 hides ids before its end"):
        rows[1]


LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp2 sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "pp2 vpp1": Layout(pp=2, schedule="interleaved", layers_per_stage=1),
    "tp2 pp2": Layout(tp=2, pp=2),
    "cp2 tp2 sp": Layout(cp=2, tp=2, sequence_parallel=True),
    "cp2 pp2": Layout(cp=2, pp=2),
    "tp2 dp2 sharded": Layout(tp=2, dp=2, sharded_optimizer=True),
}


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)


def distances(got: Trained, want: Trained) -> tuple[float, ...]:
    """Largest relative differences: losses and norms, first gradients, weights."""
    pairs = [*zip(got.losses, want.losses, strict=True), *zip(got.norms, want.norms, strict=True)]
    return (
        max(abs(a - b) / abs(b) for a, b in pairs),
        relative(got.gradients, want.gradients),
        relative(got.weights, want.weights),
    )


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.nightly if name in ("tp2", "pp2") else ()) for name in LAYOUTS],
)
def test_layouts(workers: WorkerPool, report: ReportTables, sets: tuple[Path, Path], name: str) -> None:
    layout = LAYOUTS[name]
    for kind, prefix in zip(("plain", "packs"), sets, strict=True):
        # ALiBi's mask has a part for each head, so packs use it to test how it is cut.
        model = config(position="alibi") if kind == "packs" and "sp" not in name else config()
        data = data_config(prefix, LENGTH)
        (want,) = workers.run(tune, 1, model, Layout(), data)
        got = join_stages(workers.run(tune, layout.world_size, model, layout, data), layout)
        found = distances(got, want)
        title = "Full fine-tuning against one process, float64: largest relative differences"
        report.add(title, ("layout", "rows", "losses and norms", "gradients", "weights"), name, kind, *found)
        assert max(found) < 1e-9


def test_loss_does_not_depend_on_micro_batches(sets: tuple[Path, Path]) -> None:
    """A mean of means would weigh short answers more."""
    model = model_of()
    data = PaddedBatchLoader(SFT_FORMAT, data_config(sets[0], LENGTH), 7, (BATCH, 0, 0), VOCABULARY, ALONE)

    def mean(sizes: tuple[int, ...]) -> float:
        batches: list[MicroBatch] = data.micro_batches(0, sizes)
        total = sum(float(masked_sum(model, model(batch.input).logits, batch, ALONE)) for batch in batches)
        return total / sum(float(batch.loss_mask.sum()) for batch in batches)

    assert mean((8,)) == pytest.approx(mean((1,) * 8), rel=1e-12) == pytest.approx(mean((3, 5)), rel=1e-12)


def finetune(folder: Path, model: Path, *flags: object, run: Any = run_command) -> Any:
    return run(
        "asd-core", "finetune", "--load", model, "--save", folder, "--device", "cpu", "--dtype", "float64",
        "--is-instruction-dataset", "--seq-length", LENGTH, "--split", "80,20,0", "--global-batch-size", 8,
        "--micro-batch-size", 4, "--lr", 1e-3, "--train-iters", 4, *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    save_hugging_face(config(), folder, tokenizer=tokenizer_folder)
    return folder


def test_a_run_goes_on_where_it_stopped(sets: tuple[Path, Path], base: Path, tmp_path: Path) -> None:
    flags = ("--data-path", sets[1], "--eval-interval", 2, "--eval-iters", 1)
    one = finetune(tmp_path / "one", base, *flags)
    assert one.status == 0, one.stderr
    first = finetune(tmp_path / "two", base, *flags, "--exit-interval", 2)
    assert first.status == 0, first.stderr
    second = finetune(tmp_path / "two", base, *flags, "--auto-resume", "--nproc-per-node", 2)
    assert second.status == 0, second.stderr
    assert "resumed at iteration 2" in second.stderr
    want, got = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [r["iteration"] for r in got] == [1, 2, 3, 4]
    for ours, theirs in zip(got, want, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-9)
        assert ours["trained_tokens"] == theirs["trained_tokens"]
    assert got[3]["validation_loss"] == pytest.approx(want[3]["validation_loss"], rel=1e-9)
    assert want[3]["validation_loss"] < want[1]["validation_loss"] < want[0]["lm_loss"]
    manifest = json.loads((tmp_path / "two" / "data.manifest.json").read_text())
    assert "generation" in manifest["template"]


def test_bad_input_is_one_line(sets: tuple[Path, Path], base: Path, dataset: Path, tmp_path: Path) -> None:
    def complaint(*flags: object, status: int = 1) -> str:
        done = finetune(tmp_path / "bad", base, *flags, run=call)
        assert done.status == status, done.stderr
        return str(done.complaint)

    assert "holds plain text, not samples with labels" in complaint("--data-path", dataset)
    assert "more than seq_length=48; give --seq-length" in complaint(
        "--data-path", sets[1], "--seq-length", 48
    )
    assert "leaves no validation sample" in complaint(
        "--data-path", sets[0], "--split", "100,0,0", "--eval-iters", 1, "--eval-interval", 2
    )
    assert "eod_mask_loss=true is for plain text" in complaint(
        "--data-path", sets[0], "--eod-mask-loss", status=2
    )
    done = call(
        "asd-core", "finetune", "--load", base, "--data-path", sets[0], "--seq-length", LENGTH, "--train-iters", 1,
    )  # fmt: skip
    assert "train on them with `asd-core finetune --is-instruction-dataset`" in done.complaint
