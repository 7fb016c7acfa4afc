"""What megatron-core's layers are made of: its linear layers and MLPs, with this project's norms and attention.

Without Transformer Engine its own norms refuse sequence parallelism, and its own attention holds all scores in memory
and knows neither ALiBi nor windows. A layer spec takes other modules in their place.

Shapes: S sequence, B batch, H hidden size, N query heads and K key-value heads of this rank, D head size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.kernels.fused_attention import causal_attention
from ascendspeed_core.kernels.mask_rule import MaskRule
from ascendspeed_core.kernels.reference import AttentionFunction
from ascendspeed_core.megatron import megatron
from ascendspeed_core.models.norm import LayerNorm, RMSNorm


class MaskRules:
    """Makes the rule of attention once for all layers that a micro-batch passes one after the other.

    The segments of its rows are what megatron-core hands to its layers as their mask: a layer that is recomputed gets
    nothing but tensors, and gets them when other micro-batches have passed.

    Args:
        make: of segments, [B, S] or nothing, and queries.
    """

    def __init__(self, make: Callable[[torch.Tensor | None, torch.Tensor], MaskRule | None]) -> None:
        self._make = make
        self._last: tuple[torch.Tensor, MaskRule | None] | None = None

    def rule(self, segments: torch.Tensor | None, query: torch.Tensor) -> MaskRule | None:
        """Return the rule of queries, [S, B, N, D], to whole rows; `None` where it is causal and no more."""
        if segments is None:
            return self._make(None, query)
        last = self._last
        # While they are held, nothing else is stored where they are.
        if last is None or (last[0].data_ptr(), last[0].shape) != (segments.data_ptr(), segments.shape):
            last = self._last = segments, self._make(segments, query)
        return last[1]


class CoreAttention(nn.Module):
    """Attention between heads, in the place of `DotProductAttention`.

    Attributes:
        attend: the implementation.
        options: its further arguments.
        rules: which keys a query sees; the model sets it.
    """

    rules: MaskRules

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        scale = softmax_scale if softmax_scale is not None else getattr(config, "softmax_scale", None)
        self.attend: AttentionFunction = causal_attention
        self.options = {} if scale is None else {"scale": scale}

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_: Any,
    ) -> torch.Tensor:
        """Attend: [S, B, N, D] and twice [S, B, K, D] -> [S, B, N D]; the mask is the segments, see `MaskRules`."""
        rule = self.rules.rule(attention_mask, query)
        q, k, v = (heads.permute(1, 2, 0, 3) for heads in (query, key, value))
        return self.attend(q, k, v, rule, **self.options).permute(2, 0, 1, 3).flatten(2)


class Rotary(nn.Module):
    """Angles of the rotary embedding, in the place of `RotaryEmbedding`: of the positions that a micro-batch has.

    Attributes:
        angles: of the next forward pass, [S, B or 1, 1, R].
    """

    def __init__(self) -> None:
        super().__init__()
        self.angles: torch.Tensor | None = None

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        """Return nothing of use: the angles are known."""
        return 0

    def forward(self, *_: Any, **__: Any) -> torch.Tensor | None:
        """Return the angles."""
        return self.angles


def norm_class(model: ModelConfig, of_heads: bool = False) -> type:
    """Return what makes the norms of a model, called as megatron-core's are.

    Args:
        model: the architecture.
        of_heads: of queries and keys, which are always `RMSNorm`.
    """
    is_layer_norm = model.norm == "layernorm" and not of_heads

    class Norm:
        """Makes this project's norm and says that its gradient is partial where the sequence is cut."""

        def __new__(cls, config: Any, hidden_size: int, eps: float, **_: Any) -> Any:
            norm = (
                LayerNorm(hidden_size, eps, model.norm_bias, model.norm_unit_offset)
                if is_layer_norm
                else RMSNorm(hidden_size, eps, model.norm_unit_offset)
            )
            mark_partial(norm, config)
            return norm

    return Norm


def mark_partial(module: nn.Module, config: Any) -> None:
    """Tell megatron-core that the gradients of a module are of a part of the sequence, if it is cut."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def activation_of(model: ModelConfig) -> Any:
    """Return the function between the matrices of an MLP."""
    if model.mlp == "swiglu":
        return F.silu
    return _squared_relu if model.mlp == "relu2" else _tanh_gelu


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


def block_spec(model: ModelConfig, layers: Sequence[int]) -> Any:
    """Return what the layers of one stage are made of.

    Args:
        model: the architecture.
        layers: their numbers in the whole model.
    """
    blocks = megatron("transformer.transformer_block")
    norm = norm_class(model)
    return blocks.TransformerBlockSubmodules(
        layer_specs=[_layer_spec(model, norm, model.has_experts(layer)) for layer in layers], layer_norm=norm
    )


def _layer_spec(model: ModelConfig, norm: type, has_experts: bool) -> Any:
    experts = model.experts if has_experts else None
    spec = megatron("models.gpt.gpt_layer_specs").get_gpt_layer_local_spec(
        num_experts=None if experts is None else experts.count,
        qk_layernorm=model.qk_norm,
        multi_latent_attention=model.kv_latent_dim is not None,
    )
    parts = spec.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    attention.core_attention = CoreAttention
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm_class(model, of_heads=True)
    if model.output_bias and not model.mlp_bias:
        attention.linear_proj = _biased(attention.linear_proj)
    return spec


def _biased(linear: Any) -> type:
    """Return what makes the same layer with a bias: `add_bias_linear` would give the MLP one too."""

    class Biased:
        """Makes the layer."""

        def __new__(cls, *args: Any, **options: Any) -> Any:
            return linear(*args, **(options | {"bias": True}))

    return Biased


def add_embedding_norm(model: Any, described: ModelConfig, config: Any) -> None:
    """Normalise what the embedding of a `GPTModel` gives, in place (Bloom)."""
    norm = norm_class(described)(config, described.hidden_size, described.norm_epsilon)
    model.embedding.norm = norm
    model.embedding.register_forward_hook(lambda _, __, embedded: norm(embedded))
