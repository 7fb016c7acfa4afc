"""Causal self-attention with grouped key-value heads (Ainslie et al., 2023, GQA).

Shapes: B batch, S sequence, H hidden size, D head size, N query heads and K key-value heads of this rank (under tensor
parallelism each rank holds N/tp and K/tp of them), T tokens attended to, R the part of a head that rotary embedding
turns.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.kernels.reference import (
    AttentionFunction,
    RotaryFunction,
    causal_attention,
    rotate_both,
)
from ascendspeed_core.models.cache import CachedPass
from ascendspeed_core.models.linear import apply_linear
from ascendspeed_core.models.norm import RMSNorm
from ascendspeed_core.models.position import AttentionInputs, AttentionKind
from ascendspeed_core.models.projections import Projections

AttentionWrapper = Callable[
    [AttentionFunction, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]
"""Calls an implementation on other queries, keys and values than it is given."""


class Attention(nn.Module):
    """Project to queries, keys and values, apply rotary embedding, attend, project back.

    Args:
        config: the model.
        kind: window and rotary embedding of this layer.
    """

    auxiliary_losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.kind = kind
        self.head_dim, self.num_key_value_heads = config.head_dim, config.num_key_value_heads
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_epsilon) if config.qk_norm else None
        self.projections = Projections(self, ("q_proj", "k_proj", "v_proj"))
        self.attend: AttentionFunction = causal_attention
        self.attention_wrapper: AttentionWrapper | None = None
        self.attend_dropping: Callable[..., torch.Tensor] | None = None
        self.rotate: RotaryFunction = rotate_both

    def cache_shapes(self, tp: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of what is kept of one token on each of `tp` ranks: its keys and values, [K, D] each.

        With more ranks than key-value heads each rank has one of them.
        """
        shape = (max(self.num_key_value_heads // tp, 1), self.head_dim)
        return shape, shape

    def forward(
        self,
        x: torch.Tensor,
        inputs: AttentionInputs,
        cache: CachedPass | None = None,
        cache_index: int = 0,
    ) -> torch.Tensor:
        """Attend: [B, S, H] -> [B, S, H].

        Args:
            x: hidden states.
            inputs: rotary angles and masks.
            cache: keys and values of earlier tokens; the new ones are added.
            cache_index: of this layer in the cache.
        """
        parts = self.projections(x, inputs.dropout_masks)
        # `unflatten` does the same in twice the time, as long as an operator on one token.
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_dim) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if inputs.rotary is not None:
            q, k = self._rotate(q, k, *inputs.rotary)
        if cache is not None:
            attended = cache.attend(cache_index, q, (k, v), self.attend, inputs.chunk_masks)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            attend = self._attend_function(inputs)
            if self.attention_wrapper is not None:
                attend = partial(self.attention_wrapper, attend)
            attended = attend(q, k, v, inputs.mask).transpose(1, 2)
        return apply_linear(self.o_proj, attended.flatten(2), inputs.dropout_masks)

    def _rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn the first R numbers of every head: [B, S, N, D] and [B, S, K, D]."""
        size = cos.shape[-1]
        if size == self.head_dim:
            return self.rotate(q, k, cos, sin)
        turned_q, turned_k = self.rotate(q[..., :size], k[..., :size], cos, sin)
        return torch.cat([turned_q, q[..., size:]], dim=-1), torch.cat([turned_k, k[..., size:]], dim=-1)

    def _attend_function(self, inputs: AttentionInputs) -> AttentionFunction:
        """Return what attends, dropping weights if dropout wants it."""
        masks = inputs.dropout_masks
        if masks is None or not masks.dropout.attention:
            return self.attend
        assert self.attend_dropping is not None
        return partial(self.attend_dropping, drop=masks.weights)
