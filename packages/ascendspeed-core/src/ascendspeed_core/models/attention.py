"""Causal self-attention with grouped key-value heads (Ainslie et al., 2023, GQA).

Shapes: B batch, S sequence, H hidden size, D head size, N query heads and K key-value heads of this device
(under tensor parallel each device holds N/tp and K/tp of them), T tokens attended to.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.cache import KeyValueCache
from ascendspeed_core.models.position import rotate


class Attention(nn.Module):
    """Project to queries, keys and values, turn by position, attend, project back."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        *,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: KeyValueCache | None = None,
        cache_layer: int = 0,
    ) -> torch.Tensor:
        """Attend: [B, S, H] -> [B, S, H].

        Args:
            x: input.
            rotary: cosine and sine of the positions, [B, S, 1, D] each.
            cache: earlier keys and values; the new ones are appended.
            cache_layer: place of this layer in the cache.
        """
        q = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), *rotary).transpose(1, 2)
        k = rotate(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), *rotary).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(cache_layer, k, v)
        out: torch.Tensor = self.o_proj(causal_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scaled dot-product attention in which the last query sees all keys, the one before all but one, and so on.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D] with T >= S.
        v: [B, K, T, D].

    Returns:
        [B, N, S, D].
    """
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if queries == keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    mask = None
    if queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
