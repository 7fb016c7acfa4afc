"""Which modules the layers of a `GPTModel` are made of: megatron-core's specs, with this project's parts in them."""

from collections.abc import Sequence
from typing import Any

from ascendspeed_core.config.megatron import LayerOptions
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.megatron import megatron
from ascendspeed_core.models.layer import attention_kind
from ascendspeed_core.optim.megatron.core import submodules_of
from ascendspeed_core.optim.megatron.latent_attention import latent_attention_class
from ascendspeed_core.optim.megatron.layers import CoreAttention, norm_class


def block_spec(model: ModelConfig, layers: Sequence[int], options: LayerOptions) -> Any:
    """Return what the layers of one stage are made of.

    Args:
        model: the architecture.
        layers: their numbers in the whole model.
        options: what they compute besides.
    """
    blocks = megatron("transformer.transformer_block")
    norm = norm_class(model)
    return blocks.TransformerBlockSubmodules(
        layer_specs=[_layer_spec(model, norm, layer, options.fp8 is not None) for layer in layers],
        layer_norm=norm,
    )


def _layer_spec(model: ModelConfig, norm: type, layer: int, in_fp8: bool) -> Any:
    experts = model.experts if model.has_experts(layer) else None
    spec = megatron("models.gpt.gpt_layer_specs").get_gpt_layer_local_spec(
        num_experts=None if experts is None else experts.count,
        qk_layernorm=model.qk_norm,
        multi_latent_attention=model.kv_latent_dim is not None,
    )
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    attention.core_attention = CoreAttention
    if model.kv_latent_dim is not None:
        rotary = attention_kind(model, layer).rotary
        assert rotary is not None
        parts.self_attention.module = latent_attention_class(model, rotary)
    elif model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm_class(model, of_heads=True)
    if in_fp8:
        _multiply_in_fp8(attention, submodules_of(parts.mlp))
    if model.output_bias and not model.mlp_bias:
        attention.linear_proj = _biased(attention.linear_proj)
    return spec


_FP8_COLUMNS = ("linear_qkv", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "linear_fc1")
_FP8_ROWS = ("linear_proj", "linear_fc2")


def _multiply_in_fp8(*submodules: Any) -> None:
    """Let linear layers be Transformer Engine's, in place: with the same names and shapes as megatron-core's own."""
    layers = megatron("extensions.transformer_engine")
    for part in submodules:
        for names, linear in (
            (_FP8_COLUMNS, layers.TEColumnParallelLinear),
            (_FP8_ROWS, layers.TERowParallelLinear),
        ):
            for name in names:
                if hasattr(part, name):
                    setattr(part, name, linear)


def _biased(linear: Any) -> type:
    """Return what makes the same layer with a bias: `add_bias_linear` would give the MLP one too."""

    class Biased:
        """Makes the layer."""

        def __new__(cls, *args: Any, **options: Any) -> Any:
            return linear(*args, **(options | {"bias": True}))

    return Biased
