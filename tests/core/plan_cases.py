"""Cases that worker processes run: what `asd-core plan` says of a step, and what the step really takes."""

from contextlib import ExitStack

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.parallel.recompute import recomputed
from ascendspeed_core.planner.fit_memory import layers_of
from ascendspeed_core.planner.rank_memory import MemoryPlanner
from ascendspeed_core.planner.workload import Workload
from core.memory_cases import measured_peak, trainee

MODES: tuple[Mode, ...] = ("none", "selective", "full")


def formula_and_measured(
    config: ModelConfig, layout: Layout, dtype_name: str, rows: int, micro_batches: int, length: int
) -> list[tuple[Mode, int, int]]:
    """By what is recomputed: the peak of this rank by formula, and as counted."""
    model, engine, batches, mesh = trainee(config, layout, dtype_name, (rows,) * micro_batches, length)
    planner = MemoryPlanner(Workload(config, layout, rows, length, dtype_name), is_fused=False, margin=0.0)
    found: list[tuple[Mode, int, int]] = []
    for mode in MODES:
        if mode == "selective" and layout.schedule in ("interleaved-zb", "zbv", "dualpipev"):
            continue
        with ExitStack() as stack:
            for layer in layers_of(model):
                stack.enter_context(recomputed(layer, mode))
            planned = planner.rank(mesh.pp_rank, micro_batches, mode).total
            found.append((mode, planned, measured_peak(model, engine, batches, mesh)))
    return found
