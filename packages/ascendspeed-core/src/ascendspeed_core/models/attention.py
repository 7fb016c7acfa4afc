"""Causal self-attention with grouped key-value heads (Ainslie et al., 2023, GQA).

Shapes: B batch, S sequence, H hidden size, D head size, N query heads and K key-value heads of this device
(under tensor parallel each device holds N/tp and K/tp of them), T tokens attended to.
"""

from collections.abc import Callable
from functools import partial

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
from ascendspeed_core.models.position import AttentionInputs
from ascendspeed_core.models.projections import Projections

AttentionWrapper = Callable[
    [AttentionFunction, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor
]
"""Calls an implementation on other queries, keys and values than it is given."""


class Attention(nn.Module):
    """Project to queries, keys and values, tell them their places, attend, project back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
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

    def forward(
        self,
        x: torch.Tensor,
        *,
        places: AttentionInputs,
        cache: CachedPass | None = None,
        cache_layer: int = 0,
    ) -> torch.Tensor:
        """Attend: [B, S, H] -> [B, S, H].

        Args:
            x: input.
            places: rotary angles of the input, and the mask.
            cache: pieces of texts whose earlier keys and values are kept; the new ones are added.
            cache_layer: place of this layer in the cache.
        """
        parts = self.projections(x, places.draws)
        # `unflatten` does the same in twice the time, as long as an operator on one token.
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_dim) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if places.rotary is not None:
            q, k = self.rotate(q, k, *places.rotary)
        if cache is not None:
            attended = cache.attend(cache_layer, q, k, v, self.attend, places.of_pieces)
        else:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            attend = self._attend_function(places)
            if self.attention_wrapper is not None:
                attend = partial(self.attention_wrapper, attend)
            attended = attend(q, k, v, places.mask).transpose(1, 2)
        return apply_linear(self.o_proj, attended.flatten(2), places.draws)

    def _attend_function(self, places: AttentionInputs) -> AttentionFunction:
        """Return what attends, dropping weights if that is asked for."""
        if places.draws is None or not places.draws.dropout.attention:
            return self.attend
        assert self.attend_dropping is not None
        return partial(self.attend_dropping, drop=places.draws.weights)
