"""Collectives that know their gradient.

Between a column-parallel and a row-parallel layer every device computes on its own. At the border stand two
functions that are each other's gradient (Shoeybi et al., 2019, Megatron-LM, section 3, `f` and `g`): going in, the
input is copied and its gradients are added up; going out, the partial results are added up and the gradient is
copied.
"""

from typing import Any

import torch
import torch.distributed as dist

SMALL_ELEMENTS = 1 << 18
"""Below this, gloo's all-reduce costs its fixed part, and parts are exchanged directly instead."""


def all_reduce_sum(x: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Add `x` up over the devices of `group`, in place; every device ends with the same bits.

    On gloo a small all-reduce takes 1.9 ms for 2 processes and 7.9 ms for 4 on a 2-core machine; sending each part
    to each process and adding them in rank order takes 0.3 and 1.8 ms.
    """
    if dist.get_backend(group) != dist.Backend.GLOO or x.numel() > SMALL_ELEMENTS:
        dist.all_reduce(x, group=group)
        return
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine = x.detach().contiguous()
    parts = [mine if other == rank else torch.empty_like(mine) for other in range(size)]
    others = [other for other in range(size) if other != rank]
    works = [dist.isend(mine, group=group, group_dst=other) for other in others]
    works += [dist.irecv(parts[other], group=group, group_src=other) for other in others]
    for work in works:
        assert work is not None
        work.wait()
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    x.copy_(total)


def copy_to_group(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `x`; its gradient is added up over the devices of `group`."""
    copied: torch.Tensor = _CopyToGroup.apply(x, group)
    return copied


def sum_over_group(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return `x` added up over the devices of `group`; its gradient is the result's."""
    total: torch.Tensor = _SumOverGroup.apply(x, group)
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
