"""Attention by blocks: those above the diagonal are never computed, and no [S, T] scores are ever stored.

The softmax runs along the key blocks with a running maximum and sum (Milakov and Gimelshein, 2018), and the backward
pass computes the probabilities of a block again from the logarithm of that sum (Dao et al., 2022, FlashAttention,
section 3.1 and appendix B). It is plain torch, so it runs on any device that torch knows. The 2023 system's
"triangle attention" skipped the same blocks, for lengths that 1,024 divides and in one softmax per row of blocks.

Shapes: B batch, N query heads, K key-value heads, S queries, T keys (the last S of them belong to the queries), D head
size. Query heads that share a key-value head lie side by side: [B, K, N/K, S, D].
"""

from collections.abc import Iterator
from typing import Any

import torch

BLOCK = 256
"""Rows and columns of a block, in tokens."""


def triangle_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    block: int = BLOCK,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention, see `kernels.reference.causal_attention`, whose result it gives.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D] with T >= S.
        v: [B, K, T, D].
        mask: of `AttentionInputs`: `None`, keys seen [S, T], or what is added [N, S, T]; or each by text,
            [B, 1, S, T] and [B, N, S, T]. Nothing above the diagonal is read.
        block: side of a block, in tokens.
        scale: factor of the scores, by default 1 / sqrt(D).

    Returns:
        [B, N, S, D].
    """
    heads = k.shape[1]
    if mask is not None:
        if mask.dim() > 2 and mask.shape[-3] > 1:
            mask = mask.unflatten(-3, (heads, -1))
        elif mask.dim() == 4:
            mask = mask.unsqueeze(2)
    grouped = q.unflatten(1, (heads, -1))
    attended: torch.Tensor = attend_by_blocks(grouped, k.unsqueeze(2), v.unsqueeze(2), mask, block, scale)[0]
    return attended.flatten(1, 2)


def blocks(queries: int, keys: int, block: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield each block of queries with the blocks of keys that any of its queries sees."""
    before = keys - queries
    for start in range(0, queries, block):
        rows = slice(start, min(start + block, queries))
        seen = before + rows.stop
        yield rows, [slice(first, min(first + block, seen)) for first in range(0, seen, block)]


def computed_share(queries: int, keys: int, block: int = BLOCK) -> float:
    """Return the share of all [S, T] scores that is computed; a half is the least for long sequences."""
    computed: int = sum(
        (rows.stop - rows.start) * (columns[-1].stop) for rows, columns in blocks(queries, keys, block)
    )
    return computed / (queries * keys)


# An operator of its own: what looks at the operators that run, as selective recompute does, sees one, and none of the
# products inside, whose results are overwritten.
@torch.library.custom_op("ascendspeed::triangle_attention", mutates_args=())
def attend_by_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    block: int,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is attended, [B, K, N/K, S, D], and the logarithm of the softmax's sum, [B, K, N/K, S].

    Args:
        q: [B, K, N/K, S, D].
        k: [B, K, 1, T, D].
        v: [B, K, 1, T, D].
        mask: as `triangle_attention`, its heads as those of q.
        block: side of a block, in tokens.
        scale: factor of the scores, by default 1 / sqrt(D).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    log_sum = q.new_empty(q.shape[:-1], dtype=wide)
    for rows, columns in blocks(q.shape[-2], k.shape[-2], block):
        part = q[..., rows, :] * scale
        largest = part.new_full((*part.shape[:-1], 1), -torch.inf, dtype=wide)
        total = torch.zeros_like(largest)
        result = part.new_zeros(part.shape, dtype=wide)
        for keys in columns:
            scores = _scores(part, k, rows, keys, mask, q.shape[-2], wide)
            higher = torch.maximum(largest, scores.amax(-1, keepdim=True))
            # A row of a block may see nothing of it, as in a sliding window.
            base = higher.masked_fill(higher == -torch.inf, 0)
            weights = scores.sub_(base).exp_()
            shrink = (largest - base).exp_()
            total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            result = result.mul_(shrink).add_(weights.to(v.dtype) @ v[..., keys, :])
            largest = higher
        out[..., rows, :] = (result / total).to(out.dtype)
        log_sum[..., rows] = (largest + total.log()).squeeze(-1)
    return out, log_sum


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, mask, ctx.block, scale = inputs
    ctx.scale = q.shape[-1] ** -0.5 if scale is None else scale
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_out: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    q, k, v, mask, out, log_sum = ctx.saved_tensors
    scale, wide = ctx.scale, log_sum.dtype
    of_q = torch.empty_like(q)
    of_k = torch.zeros_like(k, dtype=wide)
    of_v = torch.zeros_like(v, dtype=wide)
    # Sum over a row of probability times its gradient (appendix B.2).
    inner = (of_out.to(wide) * out).sum(-1, keepdim=True)
    for rows, columns in blocks(q.shape[-2], k.shape[-2], ctx.block):
        part, of_part = q[..., rows, :] * scale, of_out[..., rows, :]
        of_rows = part.new_zeros(part.shape, dtype=wide)
        for keys in columns:
            scores = _scores(part, k, rows, keys, mask, q.shape[-2], wide)
            weights = scores.sub_(log_sum[..., rows].unsqueeze(-1)).exp_()
            of_v[..., keys, :] += _over_group(weights.to(v.dtype), of_part)
            of_scores = (of_part @ v[..., keys, :].transpose(-1, -2)).to(wide)
            of_scores = of_scores.sub_(inner[..., rows, :]).mul_(weights).to(q.dtype)
            of_rows += of_scores @ k[..., keys, :]
            of_k[..., keys, :] += _over_group(of_scores, part)
        of_q[..., rows, :] = (of_rows * scale).to(q.dtype)
    return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None, None, None


attend_by_blocks.register_autograd(_backward, setup_context=_keep)

TRIANGLE_OPERATOR = torch.ops.ascendspeed.triangle_attention.default
"""What a trace of operators shows of triangle attention."""


def _scores(
    part: torch.Tensor,
    k: torch.Tensor,
    rows: slice,
    keys: slice,
    mask: torch.Tensor | None,
    queries: int,
    wide: torch.dtype,
) -> torch.Tensor:
    """Return the scores of one block, [B, K, G, rows, keys], minus infinity where a query sees nothing."""
    scores = (part @ k[..., keys, :].transpose(-1, -2)).to(wide)
    before = k.shape[-2] - queries
    if mask is not None:
        here = mask[..., rows, keys]
        scores = scores + here if here.is_floating_point() else scores.masked_fill(~here, -torch.inf)
    elif keys.stop - 1 > before + rows.start:
        row = torch.arange(before + rows.start, before + rows.stop, device=part.device).unsqueeze(-1)
        scores.masked_fill_(torch.arange(keys.start, keys.stop, device=part.device) > row, -torch.inf)
    return scores


def _over_group(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left.T @ right` added up over the query heads of each key-value head, [B, K, 1, keys, D]."""
    return (left.flatten(2, 3).transpose(-1, -2) @ right.flatten(2, 3)).unsqueeze(2)
