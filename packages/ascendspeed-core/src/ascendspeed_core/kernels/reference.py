"""Operators in the plainest torch: they say what is right, and are what other implementations are compared with.

Shapes: B batch, N query heads, K key-value heads, S queries, T keys (the last S of them belong to the queries), D head
size.
"""

from collections.abc import Callable

import torch

SoftmaxFunction = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""An implementation of `scaled_masked_softmax`."""


def scaled_masked_softmax(scores: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax over the keys of scaled scores, in fp32 for narrower ones, and back in their format.

    Args:
        scores: products of queries and keys, [B, N, S, T].
        mask: which keys are seen (bool), or what is added to the scores once scaled; fits [B, N, S, T].
        scale: factor of the scores.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    wide = wide + mask if mask.is_floating_point() else wide.masked_fill(~mask, -torch.inf)
    return wide.softmax(-1).to(scores.dtype)


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    softmax: SoftmaxFunction = scaled_masked_softmax,
    drop: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Causal attention with all scores in memory, see `models.attention.causal_attention`.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D] with T >= S.
        v: [B, K, T, D].
        mask: of `AttentionInputs`.
        softmax: what turns scores into weights.
        drop: drops some of the weights, [B, N, S, T] -> [B, N, S, T].

    Returns:
        [B, N, S, D].
    """
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(grouped, 1), v.repeat_interleave(grouped, 1)
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    weights = softmax(q @ k.transpose(-1, -2), mask, q.shape[-1] ** -0.5)
    attended: torch.Tensor = (drop(weights) if drop else weights) @ v
    return attended


def plain_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Layer normalisation, see `models.norm.layer_norm`; mean and variance in fp32 when `x` is narrower."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    return (normed * weight + bias).to(x.dtype)


def plain_token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy, see `models.lm_head.token_losses`."""
    return logits.logsumexp(-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def int8_linear(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Product with the weight that integers and scales stand for, in fp32, and back in the format of `x`.

    Args:
        x: [..., K].
        integers: int8, [N, K].
        scale: of each row of the weight, [N].

    Returns:
        [..., N].
    """
    weight = integers.float() * scale.float().unsqueeze(-1)
    return (x.float() @ weight.T).to(x.dtype)
