"""Attention by torch's fused kernels, of texts by their lengths, and by blocks where a mask would be large.

Shapes: B batch, N query heads, K key-value heads, S queries, T keys (the last S of them belong to the queries), D head
size.
"""

from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from ascendspeed_core.kernels.lengths import takes_lengths
from ascendspeed_core.kernels.mask_rule import DENSE_BYTES, MaskRule, attend_to_texts
from ascendspeed_core.kernels.reference import Mask
from ascendspeed_core.kernels.triangle import triangle_attention

ALIGNED_MASK_BYTES = 16
"""torch's attention on CUDA ends the process where a mask of numbers begins elsewhere than at a multiple of this."""


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float | None = None
) -> torch.Tensor:
    """Scaled dot-product attention in which the last query sees all keys, the one before all but one, and so on.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D] with T >= S.
        v: [B, K, T, D].
        mask: which keys are seen, or what is added.
        scale: factor of the scores, by default 1 / sqrt(D).

    Returns:
        [B, N, S, D].
    """
    if isinstance(mask, MaskRule):
        return _attend_by_rule(q, k, v, mask, scale)
    heads, groups = q.shape[1], k.shape[1]
    if mask is not None and mask.is_cuda and mask.storage_offset() * mask.itemsize % ALIGNED_MASK_BYTES:
        # The end of a wider mask may begin where the device's kernel cannot read.
        mask = mask.clone()
    if q.shape[2] == 1 and heads != groups:
        # The heads of a group are as many queries of one key-value head: its keys are read once, in one matrix product.
        of_heads = (
            mask.unflatten(0, (groups, -1)).squeeze(2) if mask is not None and mask.dim() == 3 else mask
        )
        queries = q.unflatten(1, (groups, -1)).squeeze(3)
        return _attend(queries, k, v, attn_mask=of_heads, scale=scale).flatten(1, 2).unsqueeze(2)
    is_causal = mask is None and q.shape[2] > 1
    return _attend(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=heads != groups, scale=scale)


def _attend_by_rule(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: MaskRule, scale: float | None
) -> torch.Tensor:
    """Attend to whole rows without a mask of all scores, unless it is small."""
    if rule.slopes is None and takes_lengths(q):
        return varlen_attention(q, k, v, rule, scale)
    if rule.lengths:
        return attend_to_texts(partial(causal_attention, scale=scale), q, k, v, rule)
    if rule.dense_bytes <= DENSE_BYTES:
        return causal_attention(q, k, v, rule.dense, scale)
    return triangle_attention(q, k, v, rule, scale=scale)


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: MaskRule, scale: float | None = None
) -> torch.Tensor:
    """Attend to all texts of all rows in one call of FlashAttention (Dao, 2023), in 16 bits on CUDA.

    torch's `varlen_attn` calls the same operator.

    Args:
        q: [B, N, S, D].
        k: [B, K, S, D].
        v: [B, K, S, D].
        rule: without ALiBi.
        scale: factor of the scores, by default 1 / sqrt(D).

    Returns:
        [B, N, S, D].
    """
    batch = len(q)
    lengths = [length for row in rule.lengths for length in row] or [rule.length] * batch
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)
    most = max(lengths)
    left, right = (-1, -1) if rule.window is None else (rule.window - 1, 0)
    tokens = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    attended = torch.ops.aten._flash_attention_forward(
        *tokens, ends, ends, most, most, 0.0, True, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )[0]  # fmt: skip
    found: torch.Tensor = attended.unflatten(0, (batch, -1)).transpose(1, 2)
    return found


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """Call torch's attention; outside of training without cuDNN's, which takes 30 ms for each new length of a text."""
    if not q.is_cuda or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, **options)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels):
        return F.scaled_dot_product_attention(q, k, v, **options)
