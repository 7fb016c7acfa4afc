"""What megatron-core's layers are made of: its linear layers and MLPs, with this project's norms and attention.

Without Transformer Engine its own norms refuse sequence parallelism, and its own attention holds all scores in memory
and knows neither ALiBi nor windows. A layer spec takes other modules in their place.

Shapes: S sequence, B batch, H hidden size, N query heads and K key-value heads of this rank, D head size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.kernels.fused_attention import causal_attention
from ascendspeed_core.kernels.mask_rule import MaskRule
from ascendspeed_core.kernels.reference import AttentionFunction
from ascendspeed_core.models.norm import LayerNorm, RMSNorm
from ascendspeed_core.models.position import RotaryKind, rotary_frequencies

AttentionWrapper = Callable[..., torch.Tensor]
"""Runs an implementation of attention, its first argument, on parts of sequences."""


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
        wrapper: runs it, where ranks have parts of every sequence.
        options: its further arguments.
        rules: which keys a query sees; the model sets it.
    """

    rules: MaskRules

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        scale = softmax_scale if softmax_scale is not None else getattr(config, "softmax_scale", None)
        self.attend: AttentionFunction = causal_attention
        self.wrapper: AttentionWrapper | None = None
        self.options = {} if scale is None else {"scale": scale}

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **_: Any,
    ) -> torch.Tensor:
        """Attend: [S, B, N, D] and twice [S, B, K, D] -> [S, B, N D]; the mask is the segments, see `MaskRules`.

        Values may be narrower.
        """
        rule = self.rules.rule(attention_mask, query)
        width = value.shape[-1]
        if width < key.shape[-1]:
            # Implementations take values as wide as keys.
            value = F.pad(value, (0, key.shape[-1] - width))
        q, k, v = (heads.permute(1, 2, 0, 3) for heads in (query, key, value))
        attend = partial(self.attend, **self.options)
        attended = attend(q, k, v, rule) if self.wrapper is None else self.wrapper(attend, q, k, v, rule)
        return attended[..., :width].permute(2, 0, 1, 3).flatten(2)


class Rotary(nn.Module):
    """Angles of the rotary embedding, in the place of `RotaryEmbedding`: of the positions that a micro-batch has.

    Args:
        magnitude: of cosine and sine, in the place of `YarnRotaryEmbedding`; `None` elsewhere.

    Attributes:
        angles: of the next forward pass, [S, B or 1, 1, R].
    """

    def __init__(self, magnitude: float | None = None) -> None:
        super().__init__()
        self.angles: torch.Tensor | None = None
        self._magnitude = magnitude

    def get_rotary_seq_len(self, *_: Any, **__: Any) -> int:
        """Return nothing of use: the angles are known."""
        return 0

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return the angles, with the magnitude where there is one."""
        return self.angles if self._magnitude is None else (self.angles, self._magnitude)


def rotary_angles(positions: torch.Tensor, kind: RotaryKind) -> torch.Tensor:
    """Return the angles of positions, [B, S] -> [S, B, 1, R]."""
    angles = positions.t().float().unsqueeze(-1) * rotary_frequencies(kind).to(positions.device)
    return torch.cat([angles, angles], dim=-1).unsqueeze(-2)


def norm_class(model: ModelConfig, of_heads: bool = False, epsilon: float | None = None) -> type:
    """Return what makes the norms of a model, called as megatron-core's are.

    Args:
        model: the architecture.
        of_heads: of queries and keys, which are always `RMSNorm`.
        epsilon: whatever the model's other norms have; `None` for the same.
    """
    is_layer_norm = model.norm == "layernorm" and not of_heads

    class Norm:
        """Makes this project's norm and says that its gradient is partial where the sequence is cut."""

        def __new__(cls, config: Any, hidden_size: int, eps: float, **_: Any) -> Any:
            eps = eps if epsilon is None else epsilon
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


def add_embedding_norm(model: Any, described: ModelConfig, config: Any) -> None:
    """Normalise what the embedding of a `GPTModel` gives, in place (Bloom)."""
    norm = norm_class(described)(config, described.hidden_size, described.norm_epsilon)
    model.embedding.norm = norm
    model.embedding.register_forward_hook(lambda _, __, embedded: norm(embedded))
