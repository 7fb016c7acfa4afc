"""Operators in the plainest torch: they say what is right, and are what other implementations are compared with.

Shapes: B batch, N query heads, K key-value heads, S queries, T keys (the last S of them belong to the queries), D head
size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ascendspeed_core.kernels.mask_rule import MaskRule

Mask = torch.Tensor | MaskRule | None
"""A mask of `attention_mask`, or the rule of whole rows; `None` is causal and no more."""

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
    mask: Mask,
    softmax: SoftmaxFunction = scaled_masked_softmax,
    drop: Callable[[torch.Tensor], torch.Tensor] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention with all scores in memory, see `kernels.fused_attention.causal_attention`.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D] with T >= S.
        v: [B, K, T, D].
        mask: which keys are seen, or what is added.
        softmax: what turns scores into weights.
        drop: drops some of the weights, [B, N, S, T] -> [B, N, S, T].
        scale: factor of the scores, by default 1 / sqrt(D).
        softcap: c of c tanh(s / c), which scaled scores s become (Gemma 2, 2024, section 2).
        sinks: score of each query head for nothing, [N]; it takes its share of the softmax (Xiao et al., 2024,
            Efficient Streaming Language Models with Attention Sinks; learned as in gpt-oss).

    Returns:
        [B, N, S, D].
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys = q.shape[2], k.shape[2]
    grouped = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(grouped, 1), v.repeat_interleave(grouped, 1)
    if isinstance(mask, MaskRule):
        mask = mask.dense
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    scores = q @ k.transpose(-1, -2)
    if softcap is not None:
        scores, scale = softcap * (scores * (scale / softcap)).tanh(), 1.0
    if sinks is not None:
        of_sinks = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores, scale = torch.cat([scores * scale, of_sinks], dim=-1), 1.0
        mask = F.pad(mask, (0, 1), value=0.0 if mask.is_floating_point() else True)
    weights = softmax(scores, mask, scale)
    if sinks is not None:
        weights = weights[..., :keys]
    attended: torch.Tensor = (drop(weights) if drop else weights) @ v
    return attended


def plain_layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """Layer normalisation, see `models.norm.layer_norm`; mean and variance in fp32 when `x` is narrower."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    scaled = normed * weight
    return (scaled if bias is None else scaled + bias).to(x.dtype)


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


AttentionFunction = Callable[..., torch.Tensor]
"""An implementation of `causal_attention`; some take further changes of the scores, as `reference_attention` does."""


RMSNormFunction = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""An implementation of `rms_norm`."""


LayerNormFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]
"""An implementation of `layer_norm`."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Divide the last dimension by its root mean square, and scale: `x / rms(x) * weight`.

    (Zhang and Sennrich, 2019, section 3.) The mean square is taken in fp32 when `x` is narrower, and the result is
    cast back before it meets the weight, as in Hugging Face's `LlamaRMSNorm`.

    Args:
        x: [..., H].
        weight: [H].
        epsilon: added to the mean square.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(x.dtype)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float
) -> torch.Tensor:
    """Normalise the last dimension to mean 0 and variance 1, then scale and shift (Ba et al., 2016): torch's own.

    Args:
        x: [..., H].
        weight: [H].
        bias: [H], or none.
        epsilon: added to the variance.
    """
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


GatedFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""An implementation of `silu_gated`."""


JoinedGatedFunction = Callable[[torch.Tensor], torch.Tensor]
"""An implementation of `silu_gated_joined`."""


def silu_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`, elementwise."""
    return F.silu(gate) * up


def silu_gated_joined(joined: torch.Tensor) -> torch.Tensor:
    """`silu_gated` of the two halves of the last dimension: [..., 2F] -> [..., F]."""
    gate, up = joined.chunk(2, dim=-1)
    return silu_gated(gate, up)


RotaryFunction = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]
"""An implementation of `rotate_both`."""


def rotate_both(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tell queries and keys their positions.

    Args:
        q: [B, S, N, D].
        k: [B, S, K, D].
        cos: of `AttentionInputs`, [B, S, 1, D].
        sin: likewise.
    """
    return rotate(q, cos, sin), rotate(k, cos, sin)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + D/2) of [B, S, N, D] by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""An implementation of `token_losses`."""


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each target in nats, [T].

    Args:
        logits: [T, V], fp32 or float64.
        targets: ids, [T].
    """
    return F.cross_entropy(logits, targets, reduction="none")
