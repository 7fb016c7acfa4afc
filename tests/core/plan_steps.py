"""Cases that worker processes run: how long a step takes, for the planner's benchmark and its nightly test."""

import time

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.parallel.recompute import recompute
from ascendspeed_core.planner.fit_memory import layers_of
from ascendspeed_core.training.step import train_step
from core.memory_cases import trainee


def least_step_seconds(
    config: ModelConfig,
    layout: Layout,
    dtype_name: str,
    rows: int,
    micro_batches: int,
    length: int,
    mode: Mode,
    repeats: int,
) -> tuple[float, float]:
    """Return the least seconds of a step by the clock, and of this rank's processor time."""
    model, engine, batches, mesh = trainee(config, layout, dtype_name, (rows,) * micro_batches, length)
    for layer in layers_of(model):
        recompute(layer, mode)
    by_clock, by_processor = [], []
    for _ in range(repeats + 1):
        mesh.barrier()
        begun, worked = time.perf_counter(), time.process_time()
        train_step(model, engine, batches, mesh)
        by_clock.append(time.perf_counter() - begun)
        by_processor.append(time.process_time() - worked)
    return min(by_clock[1:]), min(by_processor[1:])
