"""Operators in the plainest torch: they say what is right, and are what other implementations are compared with.

Shapes: B batch, N query heads, K key-value heads, S queries, T keys (the last S of them belong to the queries), D head
size.
"""

import torch


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Causal attention with all scores in memory, see `models.attention.causal_attention`.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D] with T >= S.
        v: [B, K, T, D].
        mask: of `Places`.

    Returns:
        [B, N, S, D].
    """
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(grouped, 1), v.repeat_interleave(grouped, 1)
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    attended: torch.Tensor = scores.softmax(-1).to(v.dtype) @ v
    return attended
