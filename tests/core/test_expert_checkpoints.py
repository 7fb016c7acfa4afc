"""Checkpoints of models with experts: any spread of the experts reads what any other wrote, biases included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model, parameter_slices
from ascendspeed_core.config.experts import ExpertsConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.device import Device
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.router_steps import train_routers
from ascendspeed_core.training.checkpoint import CheckpointWriter, TrainState, load_optimizer
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights, NativeSource, open_weights
from core.expert_cases import experts_config
from core.test_checkpoint import joined
from core.training_cases import TensorShard, micro_batches
from support.commands import call
from support.processes import WorkerPool

CONFIG = experts_config(score="sigmoid", score_bias=True)
TRAINED = ExpertsConfig(moe_aux_loss_coeff=0.05, moe_router_bias_update_rate=0.01)


class Run:
    """A model on this process, trained from a source."""

    def __init__(self, source: Any, layout: Layout, dtype: str = "float64") -> None:
        self.mesh = ParallelMesh.create(Device("cpu"), layout)
        self.model = load_model(source, self.mesh, getattr(torch, dtype))
        train_routers(self.model, TRAINED)
        self.engine = NativeEngine(self.model, OptimizerConfig(lr=1e-3), self.mesh)

    def step(self, number: int) -> float:
        size = 16 // (2 * self.mesh.layout.dp)
        batches = micro_batches(CONFIG.vocab_size, number, self.mesh, size, masked=True)
        return train_step(self.model, self.engine, batches, self.mesh).loss

    def pieces(self) -> dict[str, TensorShard]:
        slices = parameter_slices(self.model, self.mesh)
        return {name: (slices[name], p.detach().clone()) for name, p in self.model.named_parameters()}


def write(folder: str, layout: Layout, dtype: str) -> tuple[dict[str, TensorShard], list[float]]:
    """Train two steps, save, and go on; return the weights at the save, and the losses of further steps."""
    run = Run(InitialWeights(CONFIG, 5), layout, dtype)
    for number in range(2):
        run.step(number)
    pieces = run.pieces()
    writer = CheckpointWriter(Path(folder), run.mesh)
    writer.save(TrainState(2, 32, 0, 2, {}), run.model, run.engine, {})
    writer.wait()
    return pieces, [run.step(number) for number in (2, 3)]


def read(folder: str, layout: Layout, dtype: str) -> tuple[dict[str, TensorShard], list[float]]:
    source = open_weights(Path(folder))
    assert isinstance(source, NativeSource)
    run = Run(source, layout, dtype)
    load_optimizer(source, run.engine, source.description["optimizer_steps"])
    pieces = run.pieces()
    return pieces, [run.step(number) for number in (2, 3)]


@pytest.mark.parametrize(
    ("writer", "readers", "dtype"),
    [
        (Layout(dp=2, ep=2, sharded_optimizer=True), [Layout(), Layout(tp=2, ep=2, etp=1)], "float64"),
        (Layout(tp=2), [Layout(dp=2, ep=2)], "bfloat16"),
        pytest.param(
            Layout(tp=2, dp=2, ep=4, etp=1, sharded_optimizer=True),
            [Layout(pp=2, dp=2, ep=2), Layout(cp=2, ep=2), Layout(dp=2, etp=2)],
            "float64",
            marks=pytest.mark.nightly,
        ),
    ],
    ids=str,
)
def test_another_spread_of_experts_goes_on(
    workers: WorkerPool, tmp_path: Path, writer: Layout, readers: list[Layout], dtype: str
) -> None:
    written = workers.run(write, writer.world_size, str(tmp_path), writer, dtype)
    weights = joined([pieces for pieces, _ in written])
    assert any(float(weights[f"layers.{layer}.mlp.router.bias"].abs().max()) > 0.01 for layer in (1, 2, 3))
    for layout in readers:
        ranks = workers.run(read, layout.world_size, str(tmp_path), layout, dtype)
        found = joined([pieces for pieces, _ in ranks])
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        for _, losses in ranks:
            # Sums in another order; bf16 arithmetic rounds at 4e-3.
            assert losses == pytest.approx(written[0][1], rel=1e-11 if dtype == "float64" else 2e-2)


def test_the_command_trains_saves_and_goes_on(tmp_path: Path, dataset: Path) -> None:
    """Losses and loads are in the metrics, a picture shows the loads, and another layout goes on."""
    hf = {
        "architectures": ["MixtralForCausalLM"], "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    (tmp_path / "model.json").write_text(json.dumps(hf))
    arguments = [
        "asd-core", "pretrain", "--data-path", dataset, "--seq-length", 32, "--micro-batch-size", 2,
        "--global-batch-size", 8, "--train-iters", 4, "--data-cache-path", tmp_path / "cache", "--dtype", "float64",
        "--moe-aux-loss-coeff", 0.01, "--save", tmp_path / "run",
    ]  # fmt: skip
    new = ["--model-config", tmp_path / "model.json"]
    first = call(*arguments, *new, "--exit-interval", 2)
    assert first.status == 0, first.stderr
    spread = ["--nproc-per-node", 2, "--expert-model-parallel-size", 2]
    second = call(*arguments, *new, "--auto-resume", *spread)
    assert second.status == 0, second.stderr
    other = [*arguments[:-1], tmp_path / "other", *new]
    whole = call(*other)
    assert whole.status == 0, whole.stderr
    records = [
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "other")
    ]
    for ours, theirs in zip(*records, strict=True):
        for key in ("lm_loss", "grad_norm", "auxiliary_losses/balance", "expert_load/1/largest"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-11), key
        # The least a balancing loss can be is its factor for each layer, up to noise of the loads.
        assert 0.019 < ours["auxiliary_losses/balance"] < 0.06
        assert ours["expert_load/0/smallest"] <= 1 <= ours["expert_load/0/largest"]
    assert (tmp_path / "run" / "expert_load.png").stat().st_size > 5000
    refused = call(*other, "--zero-stage", 1)
    assert refused.status != 0
    assert "for a model with experts: DeepSpeed would divide the state of experts" in refused.stderr
