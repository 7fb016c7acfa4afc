"""What saving and loading a checkpoint costs on this machine, against writing and reading the same bytes.

Every ratio compares two ways measured alternately in the same processes; files are flushed to the disk.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.checkpoint import CheckpointWriter, TrainState, load_optimizer
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights, NativeSource
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

MODEL = tiny_config(
    hidden_size=512, ffn_hidden_size=1536, num_layers=8, num_attention_heads=8, head_dim=64, vocab_size=8192
)
ROUNDS = 3


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def write_bytes(path: Path, size: int) -> None:
    block = os.urandom(1 << 24)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())


def read_bytes(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass


class Bench:
    """A trained model on this process, and a folder for its checkpoints."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.mesh = folder, ParallelMesh.create(Device("cpu"), layout)
        self.model = load_model(InitialWeights(MODEL, 1), self.mesh, torch.bfloat16)
        self.engine = NativeEngine(self.model, OptimizerConfig(), self.mesh)
        self.waiting = CheckpointWriter(folder / "waiting", self.mesh)
        self.background = CheckpointWriter(folder / "background", self.mesh, in_background=True)

    def step(self) -> None:
        ids = torch.randint(MODEL.vocab_size, (1, 65), generator=torch.Generator().manual_seed(0))
        batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(1, 64))
        train_step(self.model, self.engine, [batch], self.mesh)

    def load(self, source: NativeSource) -> None:
        load_model(source, self.mesh, torch.bfloat16)
        load_optimizer(source, self.engine, self.engine.num_steps)

    def round(self, iteration: int) -> dict[str, float]:
        """Seconds of each way."""
        progress = TrainState(iteration, 0, 0, self.engine.num_steps, {})
        arguments = (progress, self.model, self.engine, {})
        raw = self.folder / f"raw-{self.mesh.rank}"
        found = {"save": seconds(lambda: self.waiting.save(*arguments))}
        source = NativeSource(self.folder / "waiting")
        size = sum(path.stat().st_size for path in source.folder.glob(f"__{self.mesh.rank}_*"))
        self.mesh.barrier()
        found["write"] = seconds(lambda: (write_bytes(raw, size), self.mesh.barrier()))
        found["step"] = seconds(self.step)
        found["background save"] = seconds(lambda: self.background.save(*arguments))
        found["step meanwhile"] = seconds(self.step)
        self.background.wait()
        found["load"] = seconds(lambda: self.load(source))
        self.mesh.barrier()
        found["read"] = seconds(lambda: read_bytes(raw))
        return found | {"MB": size / 1e6}


def measure(folder: str, layout: Layout) -> dict[str, float]:
    """Median of each way."""
    bench = Bench(Path(folder), layout)
    bench.step()
    rounds = [bench.round(iteration) for iteration in range(1, ROUNDS + 1)]
    return {name: median(found[name] for found in rounds) for name in rounds[0]}


def main() -> None:
    pool, tables = WorkerPool(), ReportTables()
    layouts = [Layout(), Layout(tp=2), Layout(dp=2), Layout(dp=2, sharded_optimizer=True)]
    for layout in layouts:
        with tempfile.TemporaryDirectory() as folder:
            ranks = pool.run(measure, layout.world_size, folder, layout)
        worst = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
        tables.add(
            f"A checkpoint of {MODEL.num_parameters:,} weights, bf16 with master weights and moments; seconds",
            ("layout", *worst, "save / write"), str(layout), *(f"{value:.2f}" for value in worst.values()),
            f"{worst['save'] / worst['write']:.2f}",
        )  # fmt: skip
    pool.close()
    print("\n".join(tables.render()))


if __name__ == "__main__":
    main()
