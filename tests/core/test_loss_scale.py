"""fp16: the loss scale follows Megatron-LM's rule, and a step that overflows is skipped by every process alike."""

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.training import LossScaleConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.optim.loss_scale import LossScale
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights
from core.training_cases import micro_batches
from support.commands import call
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "fp16 with a forced overflow in step 3: largest difference to fp32"
HEADER = ("layout", "losses, relative", "skipped steps")
CONFIG = tiny_config(tie_word_embeddings=True, vocab_size=127)
OVERFLOWING = 3


def megatrons(config: LossScaleConfig) -> Any:
    """megatron-core's scaler; it puts its numbers on a GPU by name."""
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    tensor = torch.tensor
    with patch("torch.tensor", lambda *args, device=None, **kwargs: tensor(*args, **kwargs)):
        return DynamicGradScaler(
            initial_scale=config.initial_loss_scale, min_scale=config.min_loss_scale, growth_factor=2.0,
            backoff_factor=0.5, growth_interval=config.loss_scale_window, hysteresis=config.hysteresis,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_the_rule_is_megatrons(seed: int) -> None:
    draw = random.Random(seed)
    config = LossScaleConfig(
        initial_loss_scale=2.0**10,
        min_loss_scale=4.0,
        loss_scale_window=draw.randint(2, 6),
        hysteresis=draw.randint(1, 3),
    )
    ours, theirs = LossScale.create(config, is_fp16=True), megatrons(config)
    assert ours is not None
    for _ in range(300):
        overflow = draw.random() < 0.3
        ours.update(overflow)
        theirs.update(overflow)
        assert ours.scale == float(theirs.scale)


def test_a_static_scale_stays_and_other_formats_have_none() -> None:
    scale = LossScale.create(LossScaleConfig(loss_scale=128.0), is_fp16=True)
    assert scale is not None
    scale.update(overflow=True)
    assert scale.scale == 128.0
    assert scale.is_exhausted
    assert LossScale.create(LossScaleConfig(), is_fp16=False) is None


def train(layout: Layout, dtype_name: str, steps: int = 8) -> tuple[list[float], list[int]]:
    """Train in fp16; in one step the gradient of one weight of the last process is made infinite."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(InitialWeights(CONFIG, seed=5), mesh, getattr(torch, dtype_name))
    engine = NativeEngine(model, OptimizerConfig(lr=1e-3), mesh)
    scale = LossScale.create(LossScaleConfig(initial_loss_scale=2.0**12), dtype_name == "float16")
    norm = next(parameter for name, parameter in model.named_parameters() if name.endswith("mlp_norm.weight"))
    number = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if number == OVERFLOWING and dtype_name == "float16" and mesh.rank == layout.world_size - 1:
            return gradient + torch.inf
        return gradient

    norm.register_hook(spoil)
    losses, skipped = [], []
    for number in range(steps):
        # fp32 leaves the step out that fp16 skips.
        if number == OVERFLOWING and dtype_name != "float16":
            continue
        result = train_step(
            model, engine, micro_batches(CONFIG.vocab_size, number, mesh, 4, True), mesh, scale
        )
        if result.is_skipped:
            skipped.append(number)
        else:
            losses.append(result.loss)
    return losses, skipped


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2),
        Layout(pp=2),
        Layout(dp=2),
        Layout(dp=2, sharded_optimizer=True),
        Layout(tp=2, sequence_parallel=True),
        Layout(tp=2, pp=2),
        Layout(tp=2, dp=2),
        Layout(pp=2, dp=2),
        Layout(tp=2, pp=2, dp=2, sequence_parallel=True, sharded_optimizer=True),
    ],
    ids=str,
)
def test_an_overflow_is_skipped_everywhere(workers: WorkerPool, report: ReportTables, layout: Layout) -> None:
    (want, _) = workers.run(train, 1, Layout(), "float32")[0]
    ranks = workers.run(train, layout.world_size, layout, "float16")
    for losses, skipped in ranks:
        assert skipped == [OVERFLOWING]
        assert losses == ranks[0][0]
    difference = max(abs(a - b) / b for a, b in zip(ranks[0][0], want, strict=True))
    report.add(TITLE, HEADER, str(layout), difference, str(ranks[0][1]))
    # fp16 rounds at 5e-4.
    assert difference < 2e-3


def arguments(folder: Path, dataset: Path) -> list[object]:
    (folder / "model.json").write_text(
        json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400)))
    )
    return [
        "asd-core", "pretrain", "--model-config", folder / "model.json", "--data-path", dataset, "--seq-length", 32,
        "--micro-batch-size", 4, "--train-iters", 24, "--data-cache-path", folder / "cache", "--split", "100,0,0",
        "--fp16", "--initial-loss-scale", 2.0**24, "--hysteresis", 1, "--loss-scale-window", 5, "--device", "cpu",
    ]  # fmt: skip


def test_on_the_command_line_with_a_stop_between(dataset: Path, tmp_path: Path) -> None:
    flags = arguments(tmp_path, dataset)
    whole_run = call(*flags, "--save", tmp_path / "whole")
    assert whole_run.status == 0, whole_run.stderr
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    skipped = [record["iteration"] for record in records if record["skipped"]]
    assert skipped[:2] == [1, 2], "a scale of 2**24 is too large at first"
    assert all(record["grad_norm"] is None for record in records if record["skipped"])
    scales = [record["loss_scale"] for record in records]
    assert scales[0] == 2.0**24
    assert min(scales) < 2.0**24
    assert any(later > earlier for earlier, later in pairwise(scales)), "it grows again"
    for stop in (8, 24):
        done = call(*flags, "--save", tmp_path / "parts", "--auto-resume", "--exit-interval", stop)
        assert done.status == 0, done.stderr
    again = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    keys = ("lm_loss", "grad_norm", "loss_scale", "skipped", "learning_rate", "consumed_samples")
    assert [[r[key] for key in keys] for r in again] == [[r[key] for key in keys] for r in records]


def test_an_overflow_at_the_lowest_scale_ends_the_run(dataset: Path, tmp_path: Path) -> None:
    done = call(*arguments(tmp_path, dataset), "--loss-scale", 1e30)
    assert done.status == 1
    assert (
        "fp16 overflows at loss_scale=1e+30, and it may not fall further; all results are finite, "
        in done.complaint
    )
    done = call(*arguments(tmp_path, dataset), "--min-loss-scale", 1e12)
    assert done.status == 2
    assert "min_loss_scale=1000000000000.0 is above initial_loss_scale" in done.complaint
