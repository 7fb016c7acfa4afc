"""Make this process's part of a model and fill it."""

from collections.abc import Mapping
from typing import Any

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
from ascendspeed_core.weights.load import check_weights, copy_weight, load_weights, shapes_of
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
    model = _cut_model(config, mesh, dtype, adapters).to_empty(device=mesh.device.torch)
    model.tie_weights()
    if joined_projections:
        join_projections(model)
    return model


def _cut_model(
    config: ModelConfig, mesh: ParallelMesh, dtype: torch.dtype, adapters: AdapterPlan | None
) -> Transformer:
    """Return this process's part of the model without storage."""
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
    freeze(model)
    return model


def load_model(
    source: WeightSource,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    joined_projections: bool = False,
    zero_settings: Mapping[str, Any] | None = None,
) -> Transformer:
    """Return this process's part of the model that `source` holds, reading only its own slices.

    Under ZeRO-3 it reads its tensor-parallel slices, one module after the other, and keeps its share of each.

    Args:
        source: the weights.
        mesh: this process's place.
        dtype: of the weights.
        joined_projections: see `build_model`.
        zero_settings: config of `deepspeed.initialize`, when the layout has a ZeRO stage.
    """
    adapters = source.adapters if isinstance(source, AdaptedWeights) else None
    if mesh.layout.zero_stage == 3:
        from ascendspeed_core.parallel.deepspeed import partition_weights

        assert zero_settings is not None
        model = _cut_model(source.config, mesh, dtype, adapters)
        slices = parameter_slices(model, mesh)
        check_weights(model, source, slices)

        def fill(name: str, parameter: torch.Tensor) -> None:
            copy_weight(parameter, source, name, slices[name])

        partition_weights(model, mesh, fill, zero_settings)
        return model
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
