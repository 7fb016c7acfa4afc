"""Optimizers compute what torch's own do, under any layout; their checkpoints fit together or are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.adamw import adamw_implementation
from ascendspeed_core.kernels.npu import NpuAdamW
from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights, NativeSource, open_weights
from core.training_cases import join_stages, micro_batches, train
from support import npu_operators
from support.commands import call
from support.models import tiny_config
from support.processes import WorkerPool

CONFIG = tiny_config(tie_word_embeddings=True, vocab_size=125)
CPU = Device("cpu")
SGD = {"optimizer": "sgd", "sgd_momentum": 0.8}
OPTIMIZERS = [
    {"optimizer": "adam"},
    {"optimizer": "fused_adam"},
    SGD,
    {"optimizer": "sgd", "sgd_momentum": 0.0},
]


def torchs_own(options: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The plainest of torch's implementations."""
    if options["optimizer"] == "sgd":
        return torch.optim.SGD(groups, 1e-3, options["sgd_momentum"], foreach=False)
    return torch.optim.AdamW(groups, 1e-3, (0.9, 0.999), 1e-8, foreach=False)


def plain_steps(options: dict[str, Any], steps: int) -> dict[str, torch.Tensor]:
    """The same training with torch's own optimizer, its clipping and a plain model: nothing of ours but the model."""
    model = load_model(InitialWeights(CONFIG, 5), ParallelMesh(CPU, Layout()), torch.float64)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torchs_own(
        options, [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    )
    for step in range(steps):
        (batch,) = micro_batches(CONFIG.vocab_size, step, ParallelMesh(CPU, Layout()), 16, masked=True)
        losses = torch.nn.functional.cross_entropy(
            model(batch.input).logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
        )
        mask = batch.loss_mask.flatten()
        ((losses * mask).sum() / mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tp=2, pp=2, dp=2, sequence_parallel=True, sharded_optimizer=True)],
    ids=["one process", "tp2 pp2 dp2, sharded"],
)
def test_steps_equal_torchs_own(workers: WorkerPool, options: dict[str, Any], layout: Layout) -> None:
    ranks = workers.run(train, layout.world_size, CONFIG, layout, "float64", steps=5, **options)
    found, want = join_stages(ranks, layout).weights, plain_steps(options, 5)
    assert found.keys() == want.keys()
    for name, weight in found.items():
        # float64; micro-batches and devices sum in another order than one batch of 16, and where the second moment is
        # tiny AdamW enlarges that.
        torch.testing.assert_close(weight, want[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{"optimizer": "fused_adam"}, SGD], ids=str)
def test_16_bit_weights_have_wide_masters(options: dict[str, Any]) -> None:
    mesh = ParallelMesh(CPU, Layout())
    model = load_model(InitialWeights(CONFIG, 5), mesh, torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # A hundredth of what bf16 can show: only a wide copy adds such steps up.
    engine = NativeEngine(model, OptimizerConfig(lr=1e-7, clip_grad=0, **options), mesh)
    for step in range(3):
        train_step(model, engine, micro_batches(CONFIG.vocab_size, step, mesh, 8, True), mesh)
    state = engine.optimizer.state()
    for name, p in model.named_parameters():
        _, master = state[f"master/{name}"]
        assert master.dtype == torch.float32
        assert torch.equal(master.bfloat16(), p)
        if name.endswith("q_proj.weight"):
            assert not torch.equal(master, before[name].float())


def test_npu_adamw_equals_torchs() -> None:
    npu_operators.install()
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((7, 5), (3,))]
    ours, theirs = ([p.clone() for p in start] for _ in range(2))
    optimizers = [
        make(
            [{"params": p[:1], "weight_decay": 0.1}, {"params": p[1:], "weight_decay": 0.0}],
            lr=1e-2, betas=(0.9, 0.95), eps=1e-6,
        )
        for make, p in ((NpuAdamW, ours), (torch.optim.AdamW, theirs))
    ]  # fmt: skip
    for _ in range(5):
        gradients = [torch.randn(p.shape, generator=generator) for p in start]
        for optimizer, weights in zip(optimizers, (ours, theirs), strict=True):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        # fp32, the same arithmetic in another order.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        states = [optimizer.state[weight] for optimizer, weight in zip(optimizers, (a, b), strict=True)]
        assert states[0].keys() == states[1].keys()
        for kind, value in states[0].items():
            torch.testing.assert_close(value, states[1][kind], rtol=1e-5, atol=1e-6)


def test_which_kernel_computes_adamw() -> None:
    names = {
        (optimizer, kind, dtype): adamw_implementation(optimizer, Device(kind), dtype).name
        for optimizer in ("adam", "fused_adam")
        for kind in ("cpu", "cuda", "npu")
        for dtype in (torch.float32, torch.float64)
    }
    assert names[("adam", "npu", torch.float32)] == "npu"
    assert names[("adam", "npu", torch.float64)] == "reference"
    assert {name for (_, kind, _), name in names.items() if kind != "npu"} == {"fused"}
    assert names[("fused_adam", "npu", torch.float32)] == "fused"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"optimizer": "sgd", "adam_beta2": 0.95}, "adam_beta2 means nothing with optimizer=sgd"),
        ({"sgd_momentum": 0.8}, "sgd_momentum means nothing with optimizer=adam"),
    ],
)
def test_options_of_another_optimizer(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        OptimizerConfig(**options)


@pytest.fixture
def command(tmp_path: Path, dataset: Path) -> list[object]:
    model = tmp_path / "model.json"
    model.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400))))
    return [
        "asd-core", "pretrain", "--model-config", model, "--data-path", dataset, "--seq-length", 32, "--device", "cpu",
        "--global-batch-size", 4, "--train-iters", 4, "--lr", 1e-2, "--dtype", "float64", "--split", "100,0,0",
        "--data-cache-path", tmp_path / "cache",
    ]  # fmt: skip


def losses(folder: Path) -> list[float]:
    return [record["lm_loss"] for record in read_metrics(folder / "metrics.jsonl")]


def test_checkpoints_across_optimizers(command: list[object], tmp_path: Path) -> None:
    def run(folder: str, optimizer: str, *more: object) -> Any:
        return call(*command, "--optimizer", optimizer, "--save", tmp_path / folder, *more)

    def go_on(folder: str, copy: str, optimizer: str, *more: object) -> Any:
        shutil.copytree(tmp_path / folder, tmp_path / copy)
        return run(copy, optimizer, "--auto-resume", *more)

    for optimizer in ("adam", "sgd"):
        assert run(f"{optimizer} whole", optimizer).status == 0
        assert run(f"{optimizer} half", optimizer, "--exit-interval", 2).status == 0
        assert go_on(f"{optimizer} half", f"{optimizer} resumed", optimizer).status == 0
        # Nothing differs: the same arithmetic in the same order.
        assert losses(tmp_path / f"{optimizer} resumed") == losses(tmp_path / f"{optimizer} whole")
    assert losses(tmp_path / "sgd whole")[-1] != losses(tmp_path / "adam whole")[-1]

    assert go_on("adam half", "fused", "fused_adam").status == 0
    assert losses(tmp_path / "fused") == losses(tmp_path / "adam whole")

    for before, after, held in (("sgd", "adam", "momentum_buffer"), ("adam", "sgd", "exp_avg, exp_avg_sq")):
        refused = go_on(f"{before} half", f"{before} to {after}", after)
        assert refused.status == 1
        assert f"of --optimizer {after}, it was written by {before} and holds {held};" in refused.complaint
        fresh = go_on(f"{before} half", f"{before} to fresh {after}", after, "--no-load-optim")
        assert fresh.status == 0, fresh.complaint
        assert losses(tmp_path / f"{before} to fresh {after}")[:2] == losses(tmp_path / f"{before} whole")[:2]


def step_without_tokens(layout: Layout) -> tuple[bool, list[bool]]:
    """Train with a batch that counts nothing between others: whether the weights stayed, and which steps were empty."""
    mesh = ParallelMesh.create(CPU, layout)
    model = load_model(InitialWeights(CONFIG, 5), mesh, torch.float64)
    engine = NativeEngine(model, OptimizerConfig(lr=1e-2), mesh)
    unchanged, empty = [], []
    for step in range(3):
        batches = micro_batches(CONFIG.vocab_size, step, mesh, 4, masked=True)
        if step == 1:
            for batch in batches:
                batch.loss_mask.zero_()
        before = [p.detach().clone() for p in model.parameters()]
        result = train_step(model, engine, batches, mesh)
        unchanged.append(all(map(torch.equal, before, model.parameters())))
        empty.append(result.is_empty)
    assert unchanged == empty
    return engine.num_steps == 2, empty


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(dp=2, sharded_optimizer=True), Layout(pp=2, dp=2)], ids=str
)
def test_a_batch_that_counts_nothing_is_skipped(workers: WorkerPool, layout: Layout) -> None:
    for answer in workers.run(step_without_tokens, layout.world_size, layout):
        assert answer == (True, [False, True, False])


def losses_with_an_empty_share(layout: Layout, size: int) -> list[float]:
    """Train with batches in which only the first quarter of the samples counts."""
    mesh = ParallelMesh.create(CPU, layout)
    model = load_model(InitialWeights(CONFIG, 5), mesh, torch.float64)
    engine = NativeEngine(model, OptimizerConfig(lr=1e-2), mesh)
    found = []
    for step in range(3):
        batches = micro_batches(CONFIG.vocab_size, step, mesh, size, masked=False)
        counted = 16 // layout.dp // size // 4
        for batch in batches[max(counted, 1) if mesh.dp_rank == 0 or counted else 0 :]:
            batch.loss_mask.zero_()
        found.append(train_step(model, engine, batches, mesh).loss)
    return found


def test_micro_batches_that_count_nothing(workers: WorkerPool) -> None:
    """In one layout they are micro-batches among others, in another all that a data-parallel rank has."""
    (want,) = workers.run(losses_with_an_empty_share, 1, Layout(), 4)
    for layout in (Layout(dp=4), Layout(pp=2)):
        for found in workers.run(losses_with_an_empty_share, layout.world_size, layout, 4):
            assert found == pytest.approx(want, rel=1e-12)


def test_a_run_says_that_nothing_counts(command: list[object], dataset: Path, tmp_path: Path) -> None:
    """All tokens are ends of documents, which --eod-mask-loss leaves out."""
    for path in dataset.parent.glob(f"{dataset.name}*"):
        if path.is_file():
            shutil.copy(path, tmp_path / path.name)
    only_ends = tmp_path / dataset.name
    manifest = json.loads(next(tmp_path.glob(f"{dataset.name}*.json")).read_text())
    tokens = only_ends.with_name(only_ends.name + ".bin")
    tokens.write_bytes(manifest["tokenizer"]["eos_id"].to_bytes(2, "little") * (tokens.stat().st_size // 2))
    command[command.index("--data-path") + 1] = only_ends
    done = call(
        *command, "--eod-mask-loss", "--save", tmp_path / "run", "--train-iters", 2, "--split", "90,10,0",
        "--eval-iters", 1, "--eval-interval", 2,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert (
        "iteration 2: no token of its batch counts in the loss, all are masked; the step was skipped"
        in done.stderr
    )
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [(r["lm_loss"], r["grad_norm"], r["skipped"]) for r in records] == [(None, None, True)] * 2
    assert records[-1]["validation_loss"] is None
    source = open_weights(tmp_path / "run")
    assert isinstance(source, NativeSource)
    assert source.description["optimizer_steps"] == 0
    first = InitialWeights(source.config, 1234).read("embedding.weight")
    assert torch.equal(source.read("embedding.weight"), first.to(torch.float64))
