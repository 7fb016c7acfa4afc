"""Cases that worker processes run: what a training step holds in memory, planned and measured."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.experts import ExpertsConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.objectives.objective import ObjectiveLoss
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import recomputed
from ascendspeed_core.parallel.router_steps import balanced_routers, train_routers
from ascendspeed_core.planner.fit_memory import LiveBytes, fit_recompute, layers_of, measure_step
from ascendspeed_core.planner.memory import can_be_selective, recompute_plans
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights

Trainee = tuple[Transformer, NativeEngine, list[MicroBatch], ParallelMesh]


def trainee(
    config: ModelConfig,
    layout: Layout,
    dtype_name: str,
    sizes: tuple[int, ...],
    length: int,
    loss_from_hidden: bool = False,
) -> Trainee:
    """A model, its optimizer after one step, and the micro-batches of a step."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(InitialWeights(config, seed=5), mesh, getattr(torch, dtype_name))
    model.loss_from_hidden = loss_from_hidden
    train_routers(model, ExpertsConfig(moe_aux_loss_coeff=0.01 if config.experts else 0.0))
    engine = NativeEngine(model, OptimizerConfig(), mesh)
    ids = torch.arange(max(sizes) * (length + 1)).view(max(sizes), -1) % config.vocab_size
    batches = [
        MicroBatch(ids[:size, :-1], ids[:size, 1:], torch.ones(size, length)).part_of_sequence(mesh)
        for size in sizes
    ]
    train_step(model, engine, batches, mesh)
    return model, engine, batches, mesh


def measured_peak(
    model: Transformer,
    engine: NativeEngine,
    batches: list[MicroBatch],
    mesh: Any,
    objective: ObjectiveLoss | None = None,
    beside: Sequence[torch.Tensor] = (),
) -> int:
    """Most bytes of tensors in a step, what stays between steps included, and tensors beside the model."""
    resident = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (
            *model.parameters(),
            *model.buffers(),
            *beside,
            *(weight for group in engine.rule.param_groups for weight in group["params"]),
            *(value for state in engine.rule.state.values() for value in state.values()),
        )
    }
    # As planned: experts with equal loads, whatever their scores say.
    with balanced_routers(model), LiveBytes() as live:
        train_step(model, engine, batches, mesh, objective=objective)
    return live.peak + sum(resident.values())


def planned_and_measured(
    config: ModelConfig,
    layout: Layout,
    dtype_name: str,
    sizes: tuple[int, ...],
    length: int,
    loss_from_hidden: bool = False,
) -> list[tuple[tuple[Mode, ...], int, int]]:
    """Every plan of this device, with its peak as planned and as it is."""
    model, engine, batches, mesh = trainee(config, layout, dtype_name, sizes, length, loss_from_hidden)
    memory = measure_step(model, engine, mesh, batches)
    found = []
    for modes in recompute_plans(memory.num_layers, can_be_selective(memory)):
        with ExitStack() as stack:
            for layer, mode in zip(layers_of(model), modes, strict=True):
                stack.enter_context(recomputed(layer, mode))
            found.append((modes, memory.peak(modes), measured_peak(model, engine, batches, mesh)))
    return found


def fitted(
    config: ModelConfig, layout: Layout, dtype_name: str, sizes: tuple[int, ...], length: int, budget: int
) -> tuple[list[str], int]:
    """Lines of the log, and the peak of a step, once a budget was fitted."""
    model, engine, batches, mesh = trainee(config, layout, dtype_name, sizes, length)
    lines = fit_recompute(model, engine, mesh, batches, budget)
    return lines, measured_peak(model, engine, batches, mesh)
