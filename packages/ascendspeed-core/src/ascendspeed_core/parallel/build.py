"""Make this process's part of a model and fill it."""

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.parallel import stages_of_devices
from ascendspeed_core.models.lora import AdapterPlan, add_adapters, freeze
from ascendspeed_core.models.projections import join_projections
from ascendspeed_core.models.transformer import Transformer, empty_transformer
from ascendspeed_core.parallel.context import apply_context_parallel
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.slices import Slice, tensor_slice
from ascendspeed_core.parallel.tensor import apply_tensor_parallel
from ascendspeed_core.weights.load import load_weights, shapes_of
from ascendspeed_core.weights.lora import AdaptedWeights
from ascendspeed_core.weights.source import WeightSource


def build_model(
    config: ModelConfig,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    joined_projections: bool = False,
    adapters: AdapterPlan | None = None,
) -> Transformer:
    """Return this process's part of the model, its storage on the device but not filled.

    No process ever holds more than its own slices.

    Args:
        config: the model.
        mesh: this process's place.
        dtype: of the weights.
        joined_projections: one matrix product for queries, keys and values, and one for gate and up.
        adapters: which tensors are trained, when not all are.
    """
    mine = stages_of_devices(config.num_layers, mesh.layout)[mesh.pp_rank]
    model = empty_transformer(config, dtype, mine)
    if adapters is not None:
        add_adapters(model, adapters)
    group = mesh.group("tp")
    if group is not None:
        apply_tensor_parallel(model, group, mesh.layout)
    context = mesh.group("cp")
    if context is not None:
        apply_context_parallel(model, context)
    model = model.to_empty(device=mesh.device.torch)
    model.tie_weights()
    if joined_projections:
        join_projections(model)
    freeze(model)
    return model


def load_model(
    source: WeightSource, mesh: ParallelMesh, dtype: torch.dtype, joined_projections: bool = False
) -> Transformer:
    """Return this process's part of the model that `source` holds, reading only its own slices."""
    adapters = source.adapters if isinstance(source, AdaptedWeights) else None
    model = build_model(source.config, mesh, dtype, joined_projections, adapters)
    load_weights(model, source, parameter_slices(model, mesh))
    return model


def parameter_slices(model: Transformer, mesh: ParallelMesh) -> dict[str, Slice]:
    """Return which part of each parameter this process holds."""
    shapes = shapes_of(model)
    return {
        name: tensor_slice(name, shapes[name], model.config, mesh.layout, mesh.tp_rank)
        for name, _ in model.named_parameters()
    }
