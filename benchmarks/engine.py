"""What tensor parallelism costs on this machine: collectives, and a training step, against torch's own ways.

Every ratio compares two ways measured alternately in the same processes.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.objectives.next_token import masked_sum
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.collectives import all_reduce_sum
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

ELEMENTS = (1 << 10, 1 << 14, 1 << 18, 1 << 22)
MODEL = tiny_config(
    vocab_size=4096, hidden_size=128, ffn_hidden_size=352, head_dim=16, max_position_embeddings=256
)
BATCH, LENGTH = 8, 256


def milliseconds(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median time of each way, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 2):
        for name, way in ways.items():
            dist.barrier() if dist.is_initialized() else None
            started = time.perf_counter()
            way()
            if turn >= 2:
                times[name].append((time.perf_counter() - started) * 1e3)
    return {name: median(values) for name, values in times.items()}


def collectives() -> list[tuple[int, dict[str, float]]]:
    group = dist.group.WORLD
    assert group is not None
    rows = []
    for elements in ELEMENTS:
        x = torch.ones(elements)
        ways: dict[str, Callable[[], object]] = {
            "all_reduce": lambda x=x: dist.all_reduce(x),
            "ours": lambda x=x: all_reduce_sum(x, group),
        }
        rows.append((elements, milliseconds(ways, 30)))
    return rows


def dtensor_model(config: ModelConfig, mesh: ParallelMesh) -> Transformer:
    """The same plain model under torch's own plan: DTensor does arithmetic and communication."""
    alone = ParallelMesh(mesh.device, Layout())
    model = load_model(InitialWeights(config, 1), alone, torch.float32)
    assert mesh.mesh is not None
    for layer in model.layers.values():
        plan = {
            **dict.fromkeys(("attention.q_proj", "attention.k_proj", "attention.v_proj"), ColwiseParallel()),
            **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), ColwiseParallel()),
            **dict.fromkeys(("attention.o_proj", "mlp.down_proj"), RowwiseParallel()),
        }
        parallelize_module(layer, mesh.mesh["tp"], plan)
    return model


def batch_of(model: Transformer) -> MicroBatch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (BATCH, LENGTH + 1), generator=generator)
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.ones(BATCH, LENGTH))


def our_step(mesh: ParallelMesh) -> Callable[[], object]:
    model = load_model(InitialWeights(MODEL, 1), mesh, torch.float32)
    engine = NativeEngine(model, OptimizerConfig(), mesh)
    return lambda: train_step(model, engine, [batch_of(model)], mesh)


def dtensor_step(mesh: ParallelMesh) -> Callable[[], object]:
    """A head that is whole everywhere, torch's AdamW, and no gradient norm, which ours has to compute."""
    model = dtensor_model(MODEL, mesh)
    alone = ParallelMesh(mesh.device, Layout())
    is_cut = [isinstance(parameter, DTensor) for parameter in model.parameters()]
    optimizers = [
        torch.optim.AdamW(
            [p for p, cut in zip(model.parameters(), is_cut, strict=True) if cut == kind], fused=True
        )
        for kind in (True, False)
    ]

    def step() -> None:
        batch = batch_of(model)
        (masked_sum(model, model(batch.input).logits, batch, alone) / (BATCH * LENGTH)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def training_step() -> dict[str, float]:
    size = dist.get_world_size()
    mesh = ParallelMesh.create(Device("cpu"), Layout(tp=size))
    ways = {"ours": our_step(mesh)}
    if size > 1:
        ways["with sp"] = our_step(
            ParallelMesh.create(Device("cpu"), Layout(tp=size, sequence_parallel=True))
        )
        ways["DTensor plan"] = dtensor_step(mesh)
    return milliseconds(ways, 7)


def main() -> None:
    pool, tables = WorkerPool(), ReportTables()
    for size in (2, 4):
        for elements, times in pool.run(collectives, size)[0]:
            tables.add(
                "Adding up over processes (gloo)",
                ("processes", "fp32 numbers", "all_reduce, ms", "ours, ms", "ratio"),
                size, elements, f"{times['all_reduce']:.2f}", f"{times['ours']:.2f}",
                f"{times['ours'] / times['all_reduce']:.2f}",
            )  # fmt: skip
    for size in (1, 2, 4):
        times = pool.run(training_step, size)[0]
        theirs = times.get("DTensor plan")
        tables.add(
            f"One training step, {MODEL.num_parameters:,} weights, {BATCH} x {LENGTH} tokens, fp32",
            ("layout", "ours, ms", "ours with sp, ms", "DTensor plan, ms", "ratio", "ours, tokens/s"),
            f"tp{size}", f"{times['ours']:.0f}", f"{times['with sp']:.0f}" if theirs else "",
            f"{theirs:.0f}" if theirs else "",
            f"{times['ours'] / theirs:.2f}" if theirs else "", f"{BATCH * LENGTH / times['ours'] * 1e3:,.0f}",
        )  # fmt: skip
    pool.close()
    print("\n".join(tables.render()))


if __name__ == "__main__":
    main()
