"""Causal self-attention with grouped key-value heads (Ainslie et al., 2023, GQA).

Shapes: B batch, S sequence, H hidden size, D head size, N query heads and K key-value heads of this rank (under tensor
parallelism each rank holds N/tp and K/tp of them), T tokens attended to, R the part of a head that rotary embedding
turns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.kernels.fused_attention import causal_attention
from ascendspeed_core.kernels.mask_rule import MaskRule
from ascendspeed_core.kernels.reference import (
    AttentionFunction,
    RotaryFunction,
    reference_attention,
    rotate_both,
)
from ascendspeed_core.models.cached_pass import CachedPass
from ascendspeed_core.models.linear import apply_linear
from ascendspeed_core.models.norm import AllHeadsNorm, HeadNorm, RMSNorm
from ascendspeed_core.models.position import AttentionInputs, AttentionKind
from ascendspeed_core.models.projections import Projections

AttentionWrapper = Callable[..., torch.Tensor]
"""Calls an implementation, its first argument, on other queries, keys, values and sinks than it is given."""


class Sinks(nn.Module):
    """A learned score of each query head for nothing: what it takes of the softmax is lost (gpt-oss).

    Args:
        heads: N.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))


class Attention(nn.Module):
    """Project to queries, keys and values, normalise them, apply rotary embedding, attend, project back.

    Args:
        config: the model.
        kind: window and rotary embedding of this layer.
    """

    auxiliary_losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.kind = kind
        self.head_dim, self.num_key_value_heads = config.head_dim, config.num_key_value_heads
        self.projections = self._make_projections(config)
        self._make_norms(config)
        self.sinks = Sinks(config.num_attention_heads) if config.attention_sinks else None
        options = {"scale": config.attention_scale, "softcap": config.attention_softcap}
        self.score_options: dict[str, Any] = {name: x for name, x in options.items() if x is not None}
        """What this model does to scores, as arguments of the implementation."""
        self.attend: AttentionFunction = reference_attention if changed_scores(config) else causal_attention
        self.attention_wrapper: AttentionWrapper | None = None
        self.attend_dropping: Callable[..., torch.Tensor] | None = None
        self.rotate: RotaryFunction = rotate_both

    def _make_projections(self, config: ModelConfig) -> Projections:
        """Make the linear layers; return those that read the hidden states."""
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.output_bias)
        return Projections(self, ("q_proj", "k_proj", "v_proj"))

    def _make_norms(self, config: ModelConfig) -> None:
        """Make the norms of queries and keys that the config asks for; their names say how they are cut."""
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        self.q_heads_norm: HeadNorm | AllHeadsNorm | None = None
        self.k_heads_norm: HeadNorm | AllHeadsNorm | None = None
        size, epsilon = config.head_dim, config.norm_epsilon
        heads = (config.num_attention_heads, config.num_key_value_heads)
        if not config.qk_norm:
            return
        if config.qk_norm_kind == "shared":
            self.q_norm, self.k_norm = (RMSNorm(size, epsilon, config.norm_unit_offset) for _ in heads)
        elif config.qk_norm_kind == "by_head":
            is_centred = config.norm == "layernorm"
            self.q_heads_norm, self.k_heads_norm = (HeadNorm(n, size, epsilon, is_centred) for n in heads)
        else:
            self.q_heads_norm, self.k_heads_norm = (AllHeadsNorm(n * size, epsilon) for n in heads)

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
        q, k, v = self._heads(x, inputs)
        if inputs.rotary is not None:
            q, k = self._rotate(q, k, *inputs.rotary)
        attend = self._attend_function(inputs)
        if cache is not None:
            if self.sinks is not None:
                attend = partial(attend, sinks=self.sinks.weight)
            attended = cache.attend(cache_index, q, (k, v), attend, inputs.chunk_masks)
        else:
            attended = self._attend_whole(attend, q, k, v, inputs.mask)
        return apply_linear(self.o_proj, attended.flatten(2), inputs.dropout_masks)

    def _attend_whole(
        self,
        attend: AttentionFunction,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: MaskRule | None,
    ) -> torch.Tensor:
        """Attend to whole texts without a cache: [B, S, N, D] and twice [B, S, K, D] -> [B, S, N, D]."""
        if self.attention_wrapper is not None:
            attend = partial(self.attention_wrapper, attend)
        if self.sinks is not None:
            attend = partial(attend, sinks=self.sinks.weight)
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)

    def _heads(self, x: torch.Tensor, inputs: AttentionInputs) -> tuple[torch.Tensor, ...]:
        """Return queries, keys and values, the first two normalised: [B, S, N, D] and twice [B, S, K, D]."""
        parts = self.projections(x, inputs.dropout_masks)
        if isinstance(self.q_heads_norm, AllHeadsNorm) and self.k_heads_norm is not None:
            parts = [self.q_heads_norm(parts[0]), self.k_heads_norm(parts[1]), parts[2]]
        # `unflatten` does the same in twice the time, as long as an operator on one token.
        q, k, v = (part.view(*part.shape[:-1], -1, self.head_dim) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if isinstance(self.q_heads_norm, HeadNorm) and self.k_heads_norm is not None:
            q, k = self.q_heads_norm(q), self.k_heads_norm(k)
        return q, k, v

    def _rotate(
        self, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn the first R numbers of every head: [B, S, N, D] and [B, S, K, D].

        Neighbours that make a pair come to stand half of R apart, in queries and keys alike, so that scores stay.
        """
        size = cos.shape[-1]
        if self.kind.rotary is not None and self.kind.rotary.is_interleaved:
            q, k = halves_of_pairs(q, size), halves_of_pairs(k, size)
        if size == self.head_dim:
            return self.rotate(q, k, cos, sin)
        turned_q, turned_k = self.rotate(q[..., :size], k[..., :size], cos, sin)
        return torch.cat([turned_q, q[..., size:]], dim=-1), torch.cat([turned_k, k[..., size:]], dim=-1)

    def _attend_function(self, inputs: AttentionInputs) -> AttentionFunction:
        """Return what attends, dropping weights if dropout wants it."""
        masks, options = inputs.dropout_masks, self.score_options
        if masks is None or not masks.dropout.attention:
            return partial(self.attend, **options) if options else self.attend
        assert self.attend_dropping is not None
        return partial(self.attend_dropping, drop=masks.weights, **options)


def changed_scores(config: ModelConfig) -> str | None:
    """Say what a model does to scores that torch's and torch_npu's kernels cannot; `None` if nothing."""
    found = {"soft-capped scores": config.attention_softcap is not None, "sinks": config.attention_sinks}
    return " and ".join(name for name, is_there in found.items() if is_there) or None


def halves_of_pairs(x: torch.Tensor, size: int) -> torch.Tensor:
    """Move the pairs (2i, 2i + 1) of the first `size` numbers to (i, i + size/2): [..., D] -> [..., D]."""
    pairs = x[..., :size].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return pairs if size == x.shape[-1] else torch.cat([pairs, x[..., size:]], dim=-1)
