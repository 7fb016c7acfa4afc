"""Make this rank's part of a model and fill it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.compute import ComputeConfig
from ascendspeed_core.config.layout import stages_of_ranks
from ascendspeed_core.config.model import ModelConfig, WeightQuantization
from ascendspeed_core.config.sharding import Slice, tensor_sharding, tensor_slice
from ascendspeed_core.kernels.experts import grouped_product
from ascendspeed_core.kernels.int8 import Workspace, refuse_missing_format
from ascendspeed_core.kernels.registry import (
    FROM_HIDDEN,
    JOINED_GATED,
    UNPERMUTE,
    Choice,
    ExpertLayers,
    KernelContext,
    choose,
)
from ascendspeed_core.models.attention import Attention, changed_scores
from ascendspeed_core.models.experts import ExpertsMLP
from ascendspeed_core.models.int8 import Int8Weight, largest_of_rows, quantize
from ascendspeed_core.models.latent_attention import MOVED_LAYERS
from ascendspeed_core.models.linear import HALVES, LoraLinear
from ascendspeed_core.models.lora import AdapterPlan, add_adapters, freeze
from ascendspeed_core.models.mlp import SwiGLU
from ascendspeed_core.models.norm import LayerNorm, RMSNorm
from ascendspeed_core.models.projections import join_projections, make_joined_projections
from ascendspeed_core.models.transformer import Transformer, empty_transformer, filled_in_turn
from ascendspeed_core.parallel.collectives import all_reduce_max
from ascendspeed_core.parallel.context import apply_context_parallel
from ascendspeed_core.parallel.experts import apply_expert_parallel
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.tensor import apply_tensor_parallel, shard_parameters
from ascendspeed_core.weights.load import check_weights, copy_weight, load_weights, shapes_of
from ascendspeed_core.weights.source import WeightSource
from ascendspeed_data.errors import ConfigError


def build_model(
    config: ModelConfig,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    joined_projections: bool = False,
    adapters: AdapterPlan | None = None,
) -> Transformer:
    """Return this rank's part of the model, its storage on the device but not filled.

    No process ever holds more than its own slices.

    Args:
        config: the model.
        mesh: the mesh, with this rank's coordinates.
        dtype: of the weights.
        joined_projections: one matrix product for queries, keys and values, and one for gate and up.
        adapters: which tensors are trained, when not all are.
    """
    model, device = _cut_model(config, mesh, dtype, adapters), mesh.device.torch
    if joined_projections:
        make_joined_projections(model, device)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                storage = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(module, name, nn.Parameter(storage, requires_grad=parameter.requires_grad))
    model.tie_weights()
    return model


def _cut_model(
    config: ModelConfig, mesh: ParallelMesh, dtype: torch.dtype, adapters: AdapterPlan | None
) -> Transformer:
    """Return this rank's part of the model without storage."""
    mine = stages_of_ranks(config.num_layers, mesh.layout)[mesh.pp_rank]
    model = empty_transformer(config, dtype, mine)
    if adapters is not None:
        add_adapters(model, adapters)
    if config.experts is not None:
        apply_expert_parallel(model, mesh)
    group = mesh.group("tp")
    if group is not None or mesh.group("etp") is not None:
        shard_parameters(model, mesh.layout, mesh.tp_rank, mesh.index("etp"))
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
    weight_quantization: WeightQuantization = "none",
) -> Transformer:
    """Return this rank's part of the model that `source` holds, reading only its own slices.

    Under ZeRO-3 it reads its tensor-parallel slices, one module after the other, and keeps its share of each.

    Args:
        source: the weights.
        mesh: the mesh, with this rank's coordinates.
        dtype: of the weights.
        joined_projections: see `build_model`.
        zero_settings: config of `deepspeed.initialize`, when the layout has a ZeRO stage.
        weight_quantization: `int8` makes a model for inference only, see `load_int8_model`.
    """
    if weight_quantization == "int8":
        return load_int8_model(source, mesh, dtype, joined_projections)
    adapters = source.adapters
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


def load_int8_model(
    source: WeightSource, mesh: ParallelMesh, dtype: torch.dtype, joined_projections: bool = False
) -> Transformer:
    """Return this rank's part of a model whose layers and head hold int8 weights; it is for inference only.

    Each weight is quantized as it is read, so besides the integers a process never holds more than one module's
    weights. Embedding, a head that is tied to it, norms, biases and adapters keep their format. The scale of a row is
    that of the whole row, also where each rank holds a part of it: the integers are the same under every layout.

    Args:
        source: the weights; not spread by ZeRO-3.
        mesh: the mesh, with this rank's coordinates.
        dtype: of activations, scales, and what is not quantized.
        joined_projections: see `build_model`.

    Raises:
        ConfigError: the device has no such product in that format, or ZeRO-3 is to spread the weights.
        AscendSpeedError: a weight is not finite.
    """
    refuse_missing_format(dtype, mesh.device)
    refuse_spread_int8(mesh.layout.zero_stage)
    model = _cut_model(source.config, mesh, dtype, source.adapters)
    slices = parameter_slices(model, mesh)
    check_weights(model, source, slices)
    names, workspace = {module: name for name, module in model.named_modules()}, Workspace()
    for module in filled_in_turn(
        model, mesh.device.torch, lambda name, parameter: copy_weight(parameter, source, name, slices[name])
    ):
        if isinstance(module, nn.Linear) and _becomes_int8(model, names[module]):
            _quantize_layer(module, f"{names[module]}.weight", slices, mesh, workspace)
    if joined_projections:
        join_projections(model)
    return model.requires_grad_(False)


def refuse_spread_int8(zero_stage: int | None) -> None:
    """Raise `ConfigError` where int8 weights are to be spread by ZeRO-3."""
    if zero_stage == 3:
        raise ConfigError(
            "weight_quantization=int8 and zero_stage=3 were both given, but ZeRO-3 spreads weights in the model's "
            "format only; leave one of them out, or cut the layers: --tensor-model-parallel-size"
        )


def _becomes_int8(model: Transformer, layer: str) -> bool:
    """Whether a linear layer's weight does: no head that shares the embedding's, no adapter's halves, no single row."""
    return not layer.endswith((*HALVES, *MOVED_LAYERS, "shared_expert_gate")) and not (
        layer == "output_head" and model.config.tie_word_embeddings
    )


def _quantize_layer(
    linear: nn.Linear, name: str, slices: Mapping[str, Slice], mesh: ParallelMesh, workspace: Workspace
) -> None:
    largest = largest_of_rows(linear.weight)
    group = mesh.group(tensor_sharding(name).axis)
    if group is not None and slices[name].sizes[1] < slices[name].shape[1]:
        all_reduce_max(largest, group)
    linear.weight = nn.Parameter(quantize(linear.weight, largest, workspace, name), requires_grad=False)


def parameter_slices(model: Transformer, mesh: ParallelMesh) -> dict[str, Slice]:
    """Return which part of each parameter this rank holds."""
    shapes = shapes_of(model)
    tp_rank, etp_rank = mesh.tp_rank, mesh.index("etp")
    return {
        name: tensor_slice(name, shapes[name], model.config, mesh.layout, tp_rank, etp_rank=etp_rank)
        for name, _ in model.named_parameters()
    }


def apply_kernels(
    model: Transformer, config: ComputeConfig, context: KernelContext | None = None
) -> list[Choice]:
    """Give the layers of this process the implementations that `config` asks for, in place.

    Args:
        model: this rank's part.
        config: names, or `auto`.
        context: where it runs; by default a CPU with the whole vocabulary.

    Returns:
        What was chosen, by operator.

    Raises:
        ConfigError: an operator was named that the model does not have.
        AscendSpeedError: an implementation was named that cannot run here.
    """
    context = replace(
        context or KernelContext(),
        head_dim=model.config.head_dim,
        changes_scores=changed_scores(model.config),
        expert_layers=_expert_layers(model),
    )
    chosen: dict[str, Callable[..., Any]] = {}
    choices: list[Choice] = []
    for operator, asked in config.kernel_names().items():
        reason = _absence(operator, model, choices)
        if reason is None:
            implementation, choice = choose(operator, asked, context)
            chosen[operator] = implementation.run
            choices.append(choice)
        elif asked != "auto":
            raise ConfigError(f"{operator}={asked} was asked for, but {reason}; leave it out")
    if "scaled_masked_softmax" in chosen:
        chosen["attention"] = partial(chosen["attention"], softmax=chosen["scaled_masked_softmax"])
    model.token_losses = chosen["cross_entropy"]
    model.loss_from_hidden = any(
        choice.operator == "cross_entropy" and choice.implementation == FROM_HIDDEN for choice in choices
    )
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = chosen["attention"]
            module.attend_dropping = chosen["attention"] if context.drops_attention else None
            module.rotate = chosen.get("rotary", module.rotate)
        elif isinstance(module, RMSNorm):
            module.normalise = chosen["rms_norm"]
        elif isinstance(module, LayerNorm):
            module.normalise = chosen["layer_norm"]
        elif isinstance(module, SwiGLU):
            module.gated = chosen["swiglu"]
            module.gated_joined = JOINED_GATED.get(chosen["swiglu"])
        elif isinstance(module, ExpertsMLP):
            module.permute = chosen["token_permutation"]
            module.unpermute = UNPERMUTE[module.permute]
            product = chosen["grouped_product"]
            # The plainest way to compute one expert after the other is to apply each.
            module.product = None if product is grouped_product else product
    return choices


def _expert_layers(model: Transformer) -> ExpertLayers:
    """Return what the linear layers of this process's experts are."""
    linear = [
        part
        for module in model.modules()
        if isinstance(module, ExpertsMLP)
        for part in module.experts.modules()
        if isinstance(part, nn.Linear)
    ]
    if any(isinstance(part, LoraLinear) for part in linear):
        return "adapted"
    if any(part.bias is not None for part in linear):
        return "biased"
    return "int8" if any(isinstance(part.weight, Int8Weight) for part in linear) else "plain"


def apply_inference_kernels(model: Transformer, mesh: ParallelMesh) -> None:
    """Give a model for inference the implementations that `auto` takes on its device, for texts of any length."""
    context = KernelContext(
        device=mesh.device,
        dtype=next(model.parameters()).dtype,
        tp=mesh.layout.tp,
        has_additive_mask=model.config.position == "alibi",
        lengths_vary=True,
    )
    names = {}
    if model.config.experts is not None:
        # All weights of experts side by side would be copied for each token.
        names["grouped_product"] = "reference"
    if changed_scores(model.config):
        # The scores of one token are few, and blocks of them fewer.
        names["attention"] = "reference"
    apply_kernels(model, ComputeConfig(**names), context)


def _absence(operator: str, model: Transformer, before: Sequence[Choice]) -> str | None:
    """Return why a model does not compute an operator; `None` if it does."""
    described = model.config
    has_rms_norm_of_heads = described.qk_norm and described.qk_norm_kind != "by_head"
    if operator == "rms_norm" and described.norm != "rmsnorm" and not has_rms_norm_of_heads:
        return "the model has no RMSNorm"
    if operator == "layer_norm" and described.norm != "layernorm":
        return "the model has no LayerNorm"
    if operator == "rotary" and described.position != "rotary":
        return "the model has no rotary embedding"
    experts = described.experts
    is_clamped = experts is not None and experts.clamp is not None and not experts.dense_layers
    if operator == "swiglu" and (described.mlp != "swiglu" or is_clamped):
        return "the model has no SwiGLU"
    if operator in ("grouped_product", "token_permutation") and described.experts is None:
        return "the model has no experts"
    if operator == "scaled_masked_softmax" and before[0].implementation != "reference":
        return "only --attention reference computes a softmax of its own"
    return None


_OF_ZERO_3 = "ZeRO-3 has the head's weight while the head runs only, and the loss reads it later"


def kernel_context(
    model: Transformer,
    mesh: ParallelMesh,
    seq_length: int,
    batch: BatchConfig,
    lengths_vary: bool = False,
    drops_attention: bool = False,
) -> KernelContext:
    """Return what decides which kernels a training run can use."""
    largest = max((batch.micro_batch_size, *batch.manual_sizes()))
    return KernelContext(
        device=mesh.device,
        dtype=next(model.parameters()).dtype,
        tp=mesh.layout.tp,
        has_additive_mask=model.config.position == "alibi",
        drops_attention=drops_attention,
        seq_length=seq_length,
        lengths_vary=lengths_vary,
        micro_batch_tokens=largest * seq_length,
        logits_bytes=4
        * largest
        * (seq_length // mesh.layout.cp)
        * -(-model.config.vocab_size // mesh.layout.tp),
        needs_logits=_OF_ZERO_3 if mesh.layout.zero_stage == 3 else None,
    )
