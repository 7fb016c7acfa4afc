"""Ten steps of real training on real text, through the commands: every layout, and a killed run, end where one
process ends."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.training import DataConfig
from ascendspeed_core.data.gpt_dataset import GPTBatchLoader
from ascendspeed_core.device import Device
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import open_source, open_weights
from core.test_pretrain_command import kill_when
from core.training_cases import first_gradients
from support.commands import call, run_command
from support.processes import WorkerPool
from support.shared_data import STORIES, TOKENIZERS, WIKIPEDIA, needs_shared_data
from support.tables import ReportTables

pytestmark = needs_shared_data
TITLE = (
    "Ten steps on Wikipedia, stories260K's shape with 32,000 ids: largest relative difference to one process"
)
HEADER = ("run", "dtype", "losses", "gradients of the first step", "weights after")
# Relative to the largest entry of each tensor. Only the order of sums differs; AdamW turns rounding noise in
# near-zero gradients into whole steps of the learning rate, so fp32 weights differ by more than fp32 rounds.
TOLERANCE = {"float64": (1e-9, 1e-9, 1e-9), "float32": (1e-5, 1e-4, 2e-2)}
STEPS, BATCH, LENGTH = 10, 8, 128


@dataclass(frozen=True)
class Job:
    """Files that all runs share."""

    folder: Path

    def run_of(self, name: str) -> Path:
        return self.folder / name

    def arguments(self, name: str, dtype: str, tp: int) -> list[object]:
        return [
            "asd-core", "pretrain", "--model-config", self.folder / "model.json", "--data-path",
            self.folder / "wiki_text_document", "--split", "100,0,0", "--seq-length", LENGTH, "--micro-batch-size", 4,
            "--global-batch-size", BATCH, "--train-iters", STEPS, "--lr", 1e-3, "--save", self.run_of(name), "--dtype",
            dtype, "--device", "cpu", "--tensor-model-parallel-size", tp, "--nproc-per-node", tp,
        ]  # fmt: skip

    def alone(self, dtype: str) -> Path:
        """What one process trains, once."""
        run = self.run_of(f"one-{dtype}")
        return run if run.exists() else self.train(run.name, dtype, 1)

    def train(self, name: str, dtype: str, tp: int) -> Path:
        done = run_command(*self.arguments(name, dtype, tp))
        assert done.status == 0, done.stderr
        return self.run_of(name)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("wiki")
    config = json.loads((STORIES / "config.json").read_text()) | {"vocab_size": 32000}
    (folder / "model.json").write_text(json.dumps(config))
    done = call(
        "asd-data", "preprocess", "--input", WIKIPEDIA, "--output-prefix", folder / "wiki",
        "--tokenizer-name-or-path", TOKENIZERS / "llama",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    return Job(folder)


def gradients(folder: str, dtype: str, tp: int) -> dict[str, torch.Tensor]:
    """Gradients of the first step of the same run."""
    job = Job(Path(folder))
    mesh = ParallelMesh.create(Device("cpu"), Layout(tp=tp))
    from ascendspeed_core.config.source import ModelSourceConfig

    source = open_source(ModelSourceConfig(model_config_file=job.folder / "model.json"), 1234)
    model = load_model(source, mesh, getattr(torch, dtype))
    config = DataConfig(
        data_path=(str(job.folder / "wiki_text_document"),), split="100,0,0", seq_length=LENGTH
    )
    data = GPTBatchLoader(config, 1234, (STEPS * BATCH, 0, 0), 32000, 2, mesh)
    return first_gradients(model, data.micro_batches(0, (4, 4)), mesh)


def compare(job: Job, run: Path, dtype: str) -> tuple[float, float]:
    """Largest relative difference of losses and of weights to one process."""
    one = job.alone(dtype)
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, one))
    assert [r["iteration"] for r in ours] == [r["iteration"] for r in theirs] == list(range(1, STEPS + 1))
    losses = max(abs(a["lm_loss"] - b["lm_loss"]) / b["lm_loss"] for a, b in zip(ours, theirs, strict=True))
    return losses, difference(*({n: s.read(n) for n in s.tensors()} for s in map(open_weights, (run, one))))


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)


@pytest.mark.nightly
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layouts(workers: WorkerPool, report: ReportTables, job: Job, tp: int, dtype: str) -> None:
    losses, weights = compare(job, job.train(f"tp{tp}-{dtype}", dtype, tp), dtype)
    (want,) = workers.run(gradients, 1, str(job.folder), dtype, 1)
    got = workers.run(gradients, tp, str(job.folder), dtype, tp)[0]
    found = (losses, difference(got, want), weights)
    report.add(TITLE, HEADER, f"tp{tp}", dtype, *found)
    assert all(value < limit for value, limit in zip(found, TOLERANCE[dtype], strict=True)), found


@pytest.mark.parametrize("dtype", [pytest.param("float64", marks=pytest.mark.nightly), "float32"])
def test_killed_and_resumed_under_another_layout(report: ReportTables, job: Job, dtype: str) -> None:
    arguments = [*job.arguments(f"killed-{dtype}", dtype, 2), "--save-interval", 4]
    metrics = job.run_of(f"killed-{dtype}") / "metrics.jsonl"
    tracker = job.run_of(f"killed-{dtype}") / "latest_checkpointed_iteration.txt"
    kill_when(lambda: tracker.exists() and len(read_metrics(metrics)) >= 5, arguments)
    assert int(tracker.read_text()) in (4, 8)
    resumed = job.arguments(f"killed-{dtype}", dtype, 1)
    done = run_command(*resumed, "--auto-resume")
    assert done.status == 0, done.stderr
    losses, weights = compare(job, job.run_of(f"killed-{dtype}"), dtype)
    report.add(TITLE, HEADER, "tp2, kill -9, resumed on one process", dtype, losses, "", weights)
    limits = TOLERANCE[dtype]
    assert losses < limits[0]
    assert weights < limits[2]
