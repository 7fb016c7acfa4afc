"""Attention by blocks: those that no query sees are never computed, and no [S, T] scores are ever stored.

The softmax runs along the key blocks with a running maximum and sum (Milakov and Gimelshein, 2018), and the backward
pass computes the probabilities of a block again from the logarithm of that sum (Dao et al., 2022, FlashAttention,
section 3.1 and appendix B). It is plain torch, so it runs on any device that torch knows. The 2023 system's
"triangle attention" skipped the same blocks, for lengths that 1,024 divides and in one softmax per row of blocks.

Windows, ALiBi, soft-capping and sinks are made for a block at a time.

Shapes: B batch, N query heads, K key-value heads, S queries, T keys (the last S of them belong to the queries), D head
size. Query heads that share a key-value head lie side by side: [B, K, N/K, S, D].
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from ascendspeed_core.kernels.mask_rule import MaskRule, attend_to_texts
from ascendspeed_core.kernels.reference import Mask

BLOCK, ACCELERATOR_BLOCK = 256, 1024
"""Rows and columns of a block, in tokens: one that fits caches, one whose products take longer than asking for them."""


def triangle_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    block: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention, see `kernels.reference.reference_attention`, whose result it gives.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D] with T >= S.
        v: [B, K, T, D].
        mask: a rule of whole rows; `None`; keys seen [S, T], or what is added [N, S, T], or each by text,
            [B, 1, S, T] and [B, N, S, T]. Nothing above the diagonal is read.
        block: side of a block, in tokens, by default what suits the device.
        scale: factor of the scores, by default 1 / sqrt(D).
        softcap: see `reference_attention`.
        sinks: likewise, [N].

    Returns:
        [B, N, S, D].
    """
    if block is None:
        block = BLOCK if q.device.type == "cpu" else ACCELERATOR_BLOCK
    heads, window, slopes = k.shape[1], None, None
    if isinstance(mask, MaskRule):
        if mask.lengths:
            options: dict[str, Any] = {"block": block, "scale": scale, "softcap": softcap, "sinks": sinks}
            return attend_to_texts(partial(triangle_attention, **options), q, k, v, mask)
        window, slopes, mask = mask.window, mask.slopes, None
    if mask is not None:
        if mask.dim() > 2 and mask.shape[-3] > 1:
            mask = mask.unflatten(-3, (heads, -1))
        elif mask.dim() == 4:
            mask = mask.unsqueeze(2)
    grouped = q.unflatten(1, (heads, -1))
    attended: torch.Tensor = attend_by_blocks(
        grouped, k.unsqueeze(2), v.unsqueeze(2), mask, block, scale, window, slopes, softcap, sinks
    )[0]
    return attended.flatten(1, 2)


def blocks(
    queries: int, keys: int, block: int, window: int | None = None
) -> Iterator[tuple[slice, list[slice]]]:
    """Yield each block of queries with the blocks of keys that any of its queries sees."""
    before = keys - queries
    for start in range(0, queries, block):
        rows = slice(start, min(start + block, queries))
        seen = before + rows.stop
        first = 0 if window is None else max(before + start - window + 1, 0)
        yield rows, [slice(column, min(column + block, seen)) for column in range(first, seen, block)]


def computed_share(queries: int, keys: int, block: int = BLOCK, window: int | None = None) -> float:
    """Return the share of all [S, T] scores that is computed; a half is the least for long sequences."""
    computed: int = sum(
        (rows.stop - rows.start) * (columns[-1].stop - columns[0].start)
        for rows, columns in blocks(queries, keys, block, window)
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
    window: int | None = None,
    slopes: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is attended, [B, K, N/K, S, D], and the logarithm of the softmax's sum, [B, K, N/K, S].

    Args:
        q: [B, K, N/K, S, D].
        k: [B, K, 1, T, D].
        v: [B, K, 1, T, D].
        mask: as `triangle_attention`, its heads as those of q.
        block: side of a block, in tokens.
        scale: factor of the scores, by default 1 / sqrt(D).
        window: keys that a query sees, its own included.
        slopes: of ALiBi, [N].
        softcap: see `reference_attention`.
        sinks: likewise, [N].
    """
    changes = _Changes.create(q, k, mask, window, slopes, softcap)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    log_sum = q.new_empty(q.shape[:-1], dtype=changes.wide)
    for rows, columns in blocks(q.shape[-2], k.shape[-2], block, window):
        part = q[..., rows, :] * scale
        largest = part.new_full((*part.shape[:-1], 1), -torch.inf, dtype=changes.wide)
        total = torch.zeros_like(largest)
        if sinks is not None:
            largest.copy_(_by_head(sinks, k))
            total.fill_(1)
        result = part.new_zeros(part.shape, dtype=changes.wide)
        for keys in columns:
            scores, _ = changes.scores(part, k, rows, keys)
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
    q, k, v, mask, ctx.block, scale, ctx.window, slopes, ctx.softcap, sinks = inputs
    ctx.scale = q.shape[-1] ** -0.5 if scale is None else scale
    ctx.save_for_backward(q, k, v, mask, slopes, sinks, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_out: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    q, k, v, mask, slopes, sinks, out, log_sum = ctx.saved_tensors
    changes = _Changes.create(q, k, mask, ctx.window, slopes, ctx.softcap)
    scale, wide = ctx.scale, changes.wide
    of_q = torch.empty_like(q)
    of_k = torch.zeros_like(k, dtype=wide)
    of_v = torch.zeros_like(v, dtype=wide)
    # Sum over a row of probability times its gradient (appendix B.2).
    inner = (of_out.to(wide) * out).sum(-1, keepdim=True)
    for rows, columns in blocks(q.shape[-2], k.shape[-2], ctx.block, ctx.window):
        part, of_part = q[..., rows, :] * scale, of_out[..., rows, :]
        of_rows = part.new_zeros(part.shape, dtype=wide)
        for keys in columns:
            scores, bent = changes.scores(part, k, rows, keys)
            weights = scores.sub_(log_sum[..., rows].unsqueeze(-1)).exp_()
            of_v[..., keys, :] += _over_group(weights.to(v.dtype), of_part)
            of_scores = (of_part @ v[..., keys, :].transpose(-1, -2)).to(wide)
            of_scores = of_scores.sub_(inner[..., rows, :]).mul_(weights)
            if bent is not None:
                of_scores.mul_(1 - bent.square_())
            of_scores = of_scores.to(q.dtype)
            of_rows += of_scores @ k[..., keys, :]
            of_k[..., keys, :] += _over_group(of_scores, part)
        of_q[..., rows, :] = (of_rows * scale).to(q.dtype)
    of_sinks = None
    if sinks is not None:
        # A sink's value is nothing, so its probability's gradient is nothing, too.
        taken = (_by_head(sinks, k).squeeze(-1).to(wide) - log_sum).exp_()
        of_sinks = -(taken * inner.squeeze(-1)).sum((0, -1)).flatten().to(sinks.dtype)
    return of_q, of_k.to(k.dtype), of_v.to(v.dtype), None, None, None, None, None, None, of_sinks


attend_by_blocks.register_autograd(_backward, setup_context=_keep)

TRIANGLE_OPERATOR = torch.ops.ascendspeed.triangle_attention.default
"""What a trace of operators shows of triangle attention."""


class _Changes(NamedTuple):
    """What is done to the scores of one block.

    Attributes:
        wide: format of the scores.
        before: keys before those of the queries.
        mask: see `attend_by_blocks`; `None` is causal.
        window: likewise.
        slopes: of ALiBi, [K, N/K, 1, 1].
        softcap: see `reference_attention`.
    """

    wide: torch.dtype
    before: int
    mask: torch.Tensor | None
    window: int | None
    slopes: torch.Tensor | None
    softcap: float | None

    @classmethod
    def create(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        mask: torch.Tensor | None,
        window: int | None,
        slopes: torch.Tensor | None,
        softcap: float | None,
    ) -> "_Changes":
        """Return those of the arguments of `attend_by_blocks`."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        by_head = None if slopes is None else _by_head(slopes.to(wide), k)
        return cls(wide, k.shape[-2] - q.shape[-2], mask, window, by_head, softcap)

    def scores(
        self, part: torch.Tensor, k: torch.Tensor, rows: slice, keys: slice
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the scores of one block, [B, K, N/K, rows, keys], minus infinity where a query sees nothing.

        And the hyperbolic tangents of soft-capping, if the model does it.
        """
        scores = (part @ k[..., keys, :].transpose(-1, -2)).to(self.wide)
        bent = None
        if self.softcap is not None:
            bent = scores.div_(self.softcap).tanh_()
            scores = bent * self.softcap
        if self.mask is not None:
            here = self.mask[..., rows, keys]
            added = here.is_floating_point()
            return scores + here if added else scores.masked_fill(~here, -torch.inf), bent
        first, last = self.before + rows.start, self.before + rows.stop - 1
        is_cut = self.window is not None and keys.start <= last - self.window
        if self.slopes is None and keys.stop - 1 <= first and not is_cut:
            return scores, bent
        row = torch.arange(first, last + 1, device=part.device).unsqueeze(-1)
        distance = torch.arange(keys.start, keys.stop, device=part.device) - row
        if self.slopes is not None:
            scores += self.slopes * distance
        scores.masked_fill_(distance > 0, -torch.inf)
        if self.window is not None and is_cut:
            scores.masked_fill_(distance <= -self.window, -torch.inf)
        return scores, bent


def _by_head(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Return what belongs to query heads in the order of blocks: [N] -> [K, N/K, 1, 1]."""
    return x.view(k.shape[1], -1, 1, 1)


def _over_group(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return `left.T @ right` added up over the query heads of each key-value head, [B, K, 1, keys, D]."""
    return (left.flatten(2, 3).transpose(-1, -2) @ right.flatten(2, 3)).unsqueeze(2)
