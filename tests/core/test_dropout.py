"""Dropout drops what one process would drop, under every layout, when computed again, and in a run that goes on."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ascendspeed_core.build import apply_kernels, load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.training import ComputeConfig, DropoutConfig, RecomputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.registry import KernelContext
from ascendspeed_core.models.dropout import AFTER_ATTENTION, AFTER_MLP, Dropout, DropoutMasks, mix
from ascendspeed_core.models.families import find_family
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.parallel.dropout import apply_dropout
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights
from core.training_cases import Trained, join_stages, train
from support.commands import call, run_command
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "Dropout 0.1 and 0.2, five steps, against one process: largest difference, relative"
HEADER = ("layout", "losses", "gradients", "weights")
CONFIG = tiny_config()
DROPOUT = DropoutConfig(hidden_dropout=0.1, attention_dropout=0.2)
CPU = ParallelMesh(Device("cpu"), Layout())


def draws(seed: int = 7, samples: tuple[int, ...] = (0, 1), layer: int = 3) -> DropoutMasks:
    return Dropout(0.1, 0.2, seed).masks(torch.tensor(samples), range(4)).in_layer(layer)


def dropped(some: DropoutMasks, place: int = AFTER_MLP) -> torch.Tensor:
    return some.hidden(torch.ones(len(some.samples), 64, 96), place) == 0


def test_shares() -> None:
    ones = torch.ones(2, 256, 512)
    out = draws().hidden(ones)
    share = float((out == 0).float().mean())
    # Standard deviation of the share of 262,144 draws: 0.0006.
    assert share == pytest.approx(0.1, abs=0.003)
    assert torch.equal(out[out != 0], torch.full_like(out[out != 0], 1 / 0.9))
    weights = draws().weights(torch.ones(2, 4, 128, 256))
    assert float((weights == 0).float().mean()) == pytest.approx(0.2, abs=0.004)
    for dimension in range(3):
        # Each sample, token and column by itself: the smallest group has 512 draws, standard deviation 0.013.
        rest = [d for d in range(3) if d != dimension]
        assert float(((out == 0).float().mean(rest) - 0.1).abs().max()) < 0.07


def test_masks_that_differ_are_independent() -> None:
    """Other seed, sample, layer or place: both drop a number as often as by chance."""
    first = draws()
    masks = [
        dropped(first)[0], dropped(first)[1], dropped(draws(seed=8))[0], dropped(draws(layer=4))[0],
        dropped(first, AFTER_ATTENTION)[0], dropped(draws(samples=(2**32, 5)))[0], dropped(draws(seed=7 + 2**32))[0],
        dropped(first)[0].roll(1, 0), dropped(first)[0].roll(1, 1), dropped(first)[0].roll((1, 1), (0, 1)),
    ]  # fmt: skip
    for a, b in combinations(masks, 2):
        # 6,144 draws, 61 expected in both, standard deviation 8.
        assert 20 < int((a & b).sum()) < 105
    heads = draws().weights(torch.ones(1, 4, 64, 96))[0] == 0
    for a, b in combinations(heads, 2):
        assert 180 < int((a & b).sum()) < 310


def test_the_hash_is_that_of_its_paper() -> None:
    """`lowbias32` on unsigned numbers of Python."""

    def plain(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    numbers = torch.tensor([0, 1, 2, 77, 2**31 - 1, 2**31, 2**32 - 1, 123456789])
    assert (mix(numbers.to(torch.int32)).long() & 0xFFFFFFFF).tolist() == [plain(int(n)) for n in numbers]


def test_a_part_has_the_masks_of_the_whole() -> None:
    some = draws(samples=(4, 9))
    x = torch.rand(2, 8, 16)
    whole = some.hidden(x)
    for part in range(2):
        cut = Dropout(0.1, 0.2, 7, sequence_part=part).masks(torch.tensor([4, 9]), range(4)).in_layer(3)
        assert torch.equal(cut.hidden(x[:, part * 4 : part * 4 + 4]), whole[:, part * 4 : part * 4 + 4])
    weights = torch.rand(2, 4, 8, 8)
    half = Dropout(0.1, 0.2, 7).masks(torch.tensor([4, 9]), range(2, 4)).in_layer(3)
    assert torch.equal(half.weights(weights[:, 2:]), some.weights(weights)[:, 2:])


def test_where_it_drops() -> None:
    """A layer by hand: weights of attention, and what attention and MLP give."""
    model = load_model(InitialWeights(CONFIG, 5), CPU, torch.float64)
    apply_kernels(model, ComputeConfig(), KernelContext(drops_attention=True))
    apply_dropout(model, DROPOUT, 99, CPU)
    ids = torch.randint(0, CONFIG.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1))
    samples = torch.tensor([30, 41])
    got = model(ModelInput(ids, samples=samples)).logits

    drop = Dropout(0.1, 0.2, 99).masks(samples, range(CONFIG.num_attention_heads))
    (inputs,) = model.positions.attention_inputs(torch.arange(12).expand(2, 12), torch.float64)
    assert inputs.rotary is not None
    assert model.embedding is not None
    assert model.final_norm is not None
    assert model.output_head is not None
    x = drop.hidden(model.embedding(ids))
    for number, layer in enumerate(model.layers.values()):
        mine, attention = drop.in_layer(number), layer.attention
        q, k, v = (
            part.unflatten(-1, (-1, CONFIG.head_dim))
            for part in attention.projections(layer.attention_norm(x))
        )
        q, k = attention.rotate(q, k, *inputs.rotary)
        group = q.shape[2] // k.shape[2]
        q, k, v = q.transpose(1, 2), *(t.transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / CONFIG.head_dim**0.5
        weights = scores.masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf).softmax(-1)
        attended = (mine.weights(weights) @ v).transpose(1, 2).flatten(2)
        x = x + mine.hidden(attention.o_proj(attended), AFTER_ATTENTION)
        mlp = layer.mlp
        inner = layer.mlp_norm(x)
        x = x + mine.hidden(mlp.down_proj(F.silu(mlp.gate_proj(inner)) * mlp.up_proj(inner)), AFTER_MLP)
    torch.testing.assert_close(got, model.output_head(model.final_norm(x)), rtol=1e-10, atol=1e-12)

    with torch.no_grad():
        plain = load_model(InitialWeights(CONFIG, 5), CPU, torch.float64)
        torch.testing.assert_close(
            model(ModelInput(ids)).logits, plain(ModelInput(ids)).logits, rtol=1e-10, atol=1e-12
        )
    with pytest.raises(ValueError, match="training with dropout needs the numbers of the samples"):
        model(ModelInput(ids))


def policy(name: str) -> RecomputeConfig:
    return RecomputeConfig(checkpoint_activations=True, checkpoint_policy=name)  # type: ignore[arg-type]


CASES: list[tuple[Layout, RecomputeConfig | None]] = [
    (Layout(), policy("full")),
    (Layout(), policy("selective")),
    (Layout(), policy("attention")),
    (Layout(tp=2), None),
    (Layout(tp=2, sequence_parallel=True), policy("full")),
    (Layout(dp=2, sharded_optimizer=True), None),
    (Layout(cp=2), None),
    (Layout(cp=2, tp=2, sequence_parallel=True), policy("full")),
    (Layout(pp=2, schedule="zbv"), policy("full")),
    (Layout(tp=2, pp=2, dp=2, sequence_parallel=True, sharded_optimizer=True), policy("selective")),
]


@pytest.fixture(scope="module")
def one_process(workers: WorkerPool) -> Trained:
    (trained,) = workers.run(train, 1, CONFIG, Layout(), "float64", steps=5, dropout=DROPOUT)
    return trained


def deviation(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - value).abs().max() / value.abs().max()) for name, value in theirs.items())


@pytest.mark.parametrize(("layout", "recompute"), CASES, ids=str)
def test_layouts_drop_the_same(
    report: ReportTables,
    workers: WorkerPool,
    one_process: Trained,
    layout: Layout,
    recompute: RecomputeConfig | None,
) -> None:
    ranks = workers.run(
        train, layout.world_size, CONFIG, layout, "float64", steps=5, recompute=recompute, dropout=DROPOUT
    )
    found = join_stages(ranks, layout)
    losses = max(abs(a - b) / b for a, b in zip(found.losses, one_process.losses, strict=True))
    gradients = deviation(found.gradients, one_process.gradients)
    weights = deviation(found.weights, one_process.weights)
    name = f"{layout}, recompute {recompute.checkpoint_policy}" if recompute else str(layout)
    report.add(TITLE, HEADER, name, losses, gradients, weights)
    # float64: only sums run in another order; a mask that differed anywhere would show as 1e-2.
    assert max(losses, gradients, weights) < 1e-9


def test_it_does_something(workers: WorkerPool, one_process: Trained) -> None:
    (plain,) = workers.run(train, 1, CONFIG, Layout(), "float64", steps=1)
    assert abs(plain.losses[0] - one_process.losses[0]) > 1e-4


@pytest.fixture
def command(tmp_path: Path, dataset: Path) -> list[object]:
    model = tmp_path / "model.json"
    model.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400))))
    return [
        "asd-core", "pretrain", "--model-config", model, "--data-path", dataset, "--seq-length", 32, "--device", "cpu",
        "--global-batch-size", 4, "--train-iters", 4, "--lr", 1e-2, "--dtype", "float64", "--split", "90,10,0",
        "--data-cache-path", tmp_path / "cache", "--hidden-dropout", 0.1, "--attention-dropout", 0.1,
        "--eval-iters", 1, "--eval-interval", 4,
    ]  # fmt: skip


def test_a_run_goes_on_under_another_layout(command: list[object], tmp_path: Path) -> None:
    assert call(*command, "--save", tmp_path / "whole").status == 0
    half = call(*command, "--save", tmp_path / "half", "--exit-interval", 2)
    assert half.status == 0
    assert "not sdpa: attention_dropout drops weights, which only reference holds" in half.stderr
    done = run_command(
        *command, "--save", tmp_path / "half", "--auto-resume", "--tensor-model-parallel-size", 2, "--nproc-per-node",
        2, "--sequence-parallel",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    whole, resumed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "half"))
    for key in ("lm_loss", "grad_norm"):
        assert [r[key] for r in resumed] == pytest.approx([r[key] for r in whole], rel=1e-9)
    # Nothing is dropped when the loss is measured.
    assert resumed[-1]["validation_loss"] == pytest.approx(whole[-1]["validation_loss"], rel=1e-9)


@pytest.mark.parametrize(
    ("flags", "status", "complaint"),
    [
        (["--triangle-attn"], 1, "attention=triangle cannot run here: attention_dropout drops weights"),
        (["--hidden-dropout", 1.0], 2, "less than 1"),
    ],
    ids=["triangle", "all"],
)
def test_refusals(command: list[Any], tmp_path: Path, flags: list[Any], status: int, complaint: str) -> None:
    done = call(*command, *flags, "--save", tmp_path / "run")
    assert done.status == status
    assert complaint in done.complaint


def test_a_config_that_drops_needs_an_answer(command: list[Any], tmp_path: Path) -> None:
    """Nothing is dropped that was not asked for, and nothing that a config asks for is passed over."""
    model = tmp_path / "model.json"
    model.write_text(json.dumps(json.loads(model.read_text()) | {"attention_dropout": 0.25}))
    at = command.index("--attention-dropout")
    silent = command[:at] + command[at + 2 :]
    refused = call(*silent, "--save", tmp_path / "run")
    assert refused.status == 2
    assert f"{model}: attention_dropout=0.25, but this run would drop nothing there" in refused.complaint
    assert "give --attention-dropout 0.25" in refused.complaint
    for number, share in enumerate((0.25, 0)):
        done = call(
            *silent, "--attention-dropout", share, "--exit-interval", 1, "--save", tmp_path / str(number)
        )
        assert done.status == 0, done.stderr
