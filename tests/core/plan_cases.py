"""Cases that worker processes run: what `asd-core plan` says of a step, and what the step really takes."""

from contextlib import ExitStack

import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.optim.deepspeed import ZeroEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import recomputed
from ascendspeed_core.planner.fit_memory import LiveBytes, layers_of
from ascendspeed_core.planner.rank_memory import MemoryPlanner
from ascendspeed_core.planner.workload import Workload
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights
from core.memory_cases import measured_peak, trainee
from core.zero_cases import number_afresh, settings_of

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


def zero_formula_and_measured(
    config: ModelConfig, layout: Layout, dtype_name: str, rows: int, micro_batches: int, length: int
) -> list[tuple[Mode, int, int]]:
    """The same under DeepSpeed's stages, whose tensors are counted from the first one on."""
    number_afresh()
    mesh = ParallelMesh.create(Device("cpu"), layout)
    settings = settings_of(layout, dtype_name, largest_unit=config.vocab_size * config.hidden_size)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    planner = MemoryPlanner(Workload(config, layout, rows, length, dtype_name), is_fused=False, margin=0.0)
    ids = torch.arange(rows * (length + 1)).view(rows, -1) % config.vocab_size
    batches = [MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(rows, length)) for _ in range(micro_batches)]
    found: list[tuple[Mode, int, int]] = []
    with LiveBytes() as live:
        weights = InitialWeights(config, seed=5)
        model = load_model(weights, mesh, getattr(torch, dtype_name), zero_settings=settings)
        engine = ZeroEngine(model, OptimizerConfig(), mesh, settings)
        train_step(model, engine, batches, mesh)
        for mode in ("none", "full"):
            with ExitStack() as stack:
                for layer in layers_of(model):
                    stack.enter_context(recomputed(layer, mode))
                train_step(model, engine, batches, mesh)
                live.peak = live.now
                train_step(model, engine, batches, mesh)
                found.append((mode, planner.rank(0, micro_batches, mode).total, live.peak))
    return found
