"""Collectives that know their gradient.

Between a column-parallel and a row-parallel layer every rank computes on its own. At the border stand two
functions that are each other's gradient (Shoeybi et al., 2019, Megatron-LM, section 3, `f` and `g`): going in, the
input is copied and its gradients are summed; going out, the partial results are summed and the gradient is
copied. With sequence parallelism the two are an all-gather and a reduce-scatter along the sequence.

Shapes: B batch, S sequence, H hidden size, n ranks of the group.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ascendspeed_core.config.sharding import chunk_range
from ascendspeed_core.device import NO_FLOAT64_SUMS

Value = TypeVar("Value")

SMALL_ELEMENTS = 1 << 18
"""Below this, gloo's all-reduce costs its fixed part, and parts are exchanged directly instead."""

# torch 2.13 renamed both, and warns of the names before.
_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


Finish = Callable[[], torch.Tensor]
"""Waits for a sum that was started, and returns it."""


def all_reduce_sum(x: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Sum `x` over the ranks of `group`, in place; every rank ends with the same bits."""
    start_all_reduce_sum(x, group)()


def start_all_reduce_sum(x: torch.Tensor, group: dist.ProcessGroup) -> Finish:
    """Start to sum `x` over the ranks of `group`, in place; do not touch it until that is finished.

    On gloo a small all-reduce takes 1.9 ms for 2 processes and 7.9 ms for 4 on a 2-core machine; sending each part
    to each process and adding them in rank order takes 0.3 and 1.8 ms.
    """
    if _is_summed_here(x, group):
        gathered = all_gather_rows(x.detach(), group)
        return lambda: x.copy_(_sum_in_order(list(gathered)))
    if dist.get_backend(group) != dist.Backend.GLOO or x.numel() > SMALL_ELEMENTS:
        work = dist.all_reduce(x, group=group, async_op=True)
        return lambda: _after([work], x)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = x.detach().contiguous()
    parts = [mine if other == rank else torch.empty_like(mine) for other in range(size)]
    works = _start_exchange([mine] * size, parts, group)
    return lambda: x.copy_(_sum_in_order(_after(works, parts)))


def all_reduce_max(x: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Take the elementwise maximum of `x` over the ranks of `group`, in place."""
    if _is_summed_here(x, group):
        x.copy_(all_gather_rows(x, group).amax(0))
    else:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)


def _is_summed_here(x: torch.Tensor, group: dist.ProcessGroup) -> bool:
    """Whether the back end cannot combine this format, so that ranks exchange their parts and each combines them."""
    return x.dtype == torch.float64 and dist.get_backend(group) in NO_FLOAT64_SUMS


def copy_to_group(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `x`; its gradient is summed over the ranks of `group`."""
    copied: torch.Tensor = _CopyToGroup.apply(x, group)
    return copied


def sum_over_group(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the sum of `x` over the ranks of `group`; its gradient is the result's."""
    total: torch.Tensor = _SumOverGroup.apply(x, group)
    return total


def average_over_group(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the mean of `x` over the ranks of `group`; its gradient is the mean of theirs, as each uses the result."""
    return copy_to_group(sum_over_group(x, group), group) / dist.get_world_size(group)


def gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather the parts of the sequence, [B, S/n, H] -> [B, S, H]; the gradient is summed and cut."""
    whole: torch.Tensor = _GatherSequence.apply(x, group)
    return whole


def sum_over_group_scattering_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this rank's part of the sum, [B, S, H] -> [B, S/n, H]; the gradient is gathered."""
    part: torch.Tensor = _SumScatteringSequence.apply(x, group)
    return part


def reduce_scatter_sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum `x`, [n, D, ...], over the ranks of `group`, and return this rank's row of the sum, [D, ...]."""
    return start_reduce_scatter_sum(x, group)()


def start_reduce_scatter_sum(x: torch.Tensor, group: dist.ProcessGroup) -> Finish:
    """Start a `reduce_scatter_sum`; leave `x` alone until it is finished."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if _is_summed_here(x, group):
        received = exchange_rows(x, group)
        return lambda: _sum_in_order(list(received))
    if dist.get_backend(group) != dist.Backend.GLOO:
        mine = torch.empty_like(x[rank], memory_format=torch.contiguous_format)
        work = _REDUCE_SCATTER(mine, x.flatten(0, 1).contiguous(), group=group, async_op=True)
        return lambda: _after([work], mine)
    # gloo's own reduce-scatter is an all-reduce; sending each part where it belongs moves 1/n of that.
    rows = x.contiguous()
    parts = [rows[rank] if other == rank else torch.empty_like(rows[rank]) for other in range(size)]
    works = _start_exchange([rows[other] for other in range(size)], parts, group)
    return lambda: _sum_in_order(_after(works, parts))


def all_gather_rows(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `x` of every rank of `group`, stacked: [D, ...] -> [n, D, ...]."""
    return start_all_gather_rows(x, group)()


def start_all_gather_rows(x: torch.Tensor, group: dist.ProcessGroup) -> Finish:
    """Start an `all_gather_rows`; leave `x` alone until it is finished."""
    size = dist.get_world_size(group)
    rows, mine = x.new_empty((size, *x.shape)), x.contiguous()
    if dist.get_backend(group) != dist.Backend.GLOO:
        work = _ALL_GATHER(rows.flatten(), mine.flatten(), group=group, async_op=True)
        return lambda: _after([work], rows)
    rows[dist.get_rank(group)] = mine
    works = _start_exchange([mine] * size, list(rows), group)
    return lambda: _after(works, rows)


def exchange_rows(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Send row i of `x`, [n, ...], to rank i of `group`, and return the rows received, in order of the ranks."""
    rows = x.contiguous()
    received = torch.empty_like(rows)
    if dist.get_backend(group) != dist.Backend.GLOO:
        dist.all_to_all_single(received, rows, group=group)
        return received
    rank = dist.get_rank(group)
    received[rank] = rows[rank]
    return _after(_start_exchange(list(rows), list(received), group), received)


NoteExchange = Callable[[int], AbstractContextManager[None]]
"""Times what is done inside, given the bytes that this rank sends to others."""


def unnoted(_sent_bytes: int) -> AbstractContextManager[None]:
    """Time nothing."""
    return nullcontext()


def exchange_parts(
    x: torch.Tensor,
    to: Sequence[int],
    of: Sequence[int],
    group: dist.ProcessGroup,
    noting: NoteExchange = unnoted,
) -> torch.Tensor:
    """Send consecutive rows of `x` to the ranks of `group`, and return the rows received, in order of the ranks.

    Args:
        x: [N, H].
        to: rows for each rank; they add up to N.
        of: rows from each rank.
        group: the ranks.
        noting: what times it, and its like in the backward.
    """
    received: torch.Tensor = _ExchangeParts.apply(x, list(to), list(of), group, noting)
    return received


def take_share(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this rank's rows of `x`, which all ranks have, [T, H]; the gradients of all shares are put together.

    As `torch.chunk` cuts: the last ranks may have fewer rows, or none.
    """
    share: torch.Tensor = _TakeShare.apply(x, group)
    return share


def gather_shares(x: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Put the shares of `take_share` together, on every rank: -> [T, H]; the gradient is cut, not summed."""
    whole: torch.Tensor = _GatherShares.apply(x, length, group)
    return whole


def swap_cut(x: torch.Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Cut a dimension that is whole over the ranks of `group`, and join one that was cut.

    Args:
        x: this rank's part; n divides dimension `cut`.
        cut: dimension of which each rank gets its share.
        joined: dimension whose shares are concatenated.
        group: the ranks.
    """
    swapped: torch.Tensor = _SwapCut.apply(x, cut, joined, group)
    return swapped


def _start_exchange(
    to: list[torch.Tensor], into: list[torch.Tensor], group: dist.ProcessGroup
) -> list[dist.Work | None]:
    """Start to send `to[other]` to each other rank, and to receive `into[other]` from it."""
    others = [other for other in range(dist.get_world_size(group)) if other != dist.get_rank(group)]
    works = [dist.isend(to[other], group=group, group_dst=other) for other in others]
    return works + [dist.irecv(into[other], group=group, group_src=other) for other in others]


def _after(works: Sequence[dist.Work | None], value: Value) -> Value:
    """Wait for what was started, and return what it filled."""
    for work in works:
        assert work is not None
        work.wait()
    return value


def _sum_in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sum in rank order, so that every rank gets the same bits."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


class _CopyToGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        all_reduce_sum(total, ctx.group)
        return total, None


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        all_reduce_sum(total, group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


class _ExchangeParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        to: list[int],
        of: list[int],
        group: dist.ProcessGroup,
        noting: NoteExchange,
    ) -> torch.Tensor:
        ctx.to, ctx.of, ctx.group, ctx.noting = to, of, group, noting
        with noting(_sent_bytes(x, to, group)):
            return _exchange_parts(x, to, of, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        with ctx.noting(_sent_bytes(gradients[0], ctx.of, ctx.group)):
            return _exchange_parts(gradients[0], ctx.of, ctx.to, ctx.group), None, None, None, None


def _sent_bytes(x: torch.Tensor, to: list[int], group: dist.ProcessGroup) -> int:
    """Return the bytes of the rows that go to other ranks."""
    rows = sum(to) - to[dist.get_rank(group)]
    return rows * (x.nbytes // len(x) if len(x) else 0)


def _exchange_parts(x: torch.Tensor, to: list[int], of: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    received = x.new_empty((sum(of), *x.shape[1:]))
    x = x.contiguous()
    if dist.get_backend(group) != dist.Backend.GLOO:
        dist.all_to_all_single(received, x, of, to, group=group)
        return received
    rank, outgoing, incoming = dist.get_rank(group), x.split(to), received.split(of)
    incoming[rank].copy_(outgoing[rank])
    others = [other for other in range(len(to)) if other != rank]
    works = [dist.isend(outgoing[other], group=group, group_dst=other) for other in others if to[other]]
    works += [dist.irecv(incoming[other], group=group, group_src=other) for other in others if of[other]]
    return _after(works, received)


class _TakeShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.length, ctx.group = len(x), group
        return _share_of(x, group).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _join_shares(gradients[0], ctx.length, ctx.group), None


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _join_shares(x, length, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _share_of(gradients[0], ctx.group).contiguous(), None, None


def _share_of(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return x[chunk_range(len(x), dist.get_world_size(group), dist.get_rank(group))]


def _join_shares(x: torch.Tensor, length: int, group: dist.ProcessGroup) -> torch.Tensor:
    share = -(-length // dist.get_world_size(group))
    padded = torch.nn.functional.pad(x, (0, 0, 0, share - len(x)))
    return all_gather_rows(padded, group).flatten(0, 1)[:length]


class _SwapCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.cut, ctx.joined, ctx.group = cut, joined, group
        return _swap_cut(x, cut, joined, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _swap_cut(gradients[0], ctx.joined, ctx.cut, ctx.group), None, None, None


def _swap_cut(x: torch.Tensor, cut: int, joined: int, group: dist.ProcessGroup) -> torch.Tensor:
    rows = torch.stack(x.chunk(dist.get_world_size(group), dim=cut))
    return torch.cat(list(exchange_rows(rows, group)), dim=joined)


def _join_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return all_gather_rows(x, group).movedim(0, 1).flatten(1, 2)


def _sum_and_cut_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return reduce_scatter_sum(x.unflatten(1, (dist.get_world_size(group), -1)).movedim(1, 0), group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _join_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _sum_and_cut_sequence(gradients[0], ctx.group), None


class _SumScatteringSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _sum_and_cut_sequence(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _join_sequence(gradients[0], ctx.group), None
