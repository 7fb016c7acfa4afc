"""Sums of gradients over the ranks that hold the same weights, one message for some parameters with the same ranks.

With a sharded optimizer (ZeRO-1: Rajbhandari et al., 2020, section 5.1) each of these ranks updates some rows of every
tensor: one reduce-scatter gives it the sum of their gradients, one all-gather gives all of them the new weights. That
moves the bytes of the replicated optimizer's one all-reduce, and divides its state by the number of ranks.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ascendspeed_core.config.sharding import Slice, chunk_range
from ascendspeed_core.parallel.collectives import (
    start_all_gather_rows,
    start_all_reduce_sum,
    start_reduce_scatter_sum,
)
from ascendspeed_core.parallel.mesh import ParallelMesh

FinishSums = Callable[[], list[torch.Tensor]]
"""Waits for the sums of some parameters' gradients, and returns them, of the rows that this rank updates."""


@dataclass
class ParameterSlot:
    """One parameter as the optimizer sees it.

    Attributes:
        name: parameter name.
        parameter: what the model computes with: this rank's part of the tensor.
        rows: rows of it that this rank updates; all of them unless the optimizer is sharded.
        slice: those rows in the whole tensor.
        master: those rows in fp32 or float64; shares storage with the parameter if that is as wide.
        replicas: the ranks over which its gradient is summed.
        gradient: of the whole part, sum over micro-batches so far; kept only for 16-bit parameters.
        is_borrowed: another stage owns the parameter; it counts there in the norm.
    """

    name: str
    parameter: nn.Parameter
    rows: slice
    slice: Slice
    master: torch.Tensor
    replicas: "Replicas"
    gradient: torch.Tensor | None = None
    is_borrowed: bool = False

    @property
    def counts_in_norm(self) -> bool:
        """Whether this rank is the one of those with the same part whose gradient is counted."""
        return self.slice.tp_replica == 0 and not self.is_borrowed

    @property
    def has_copy(self) -> bool:
        """Whether the master weights are a wider copy."""
        return self.master.dtype != self.parameter.dtype

    def take_gradient(self) -> torch.Tensor:
        """Take the gradient away from the parameter, so that it is freed when it is done with; zeros if it has none."""
        if self.has_copy:
            gradient, self.gradient = self.gradient, None
        else:
            gradient, self.parameter.grad = self.parameter.grad, None
        if gradient is None:
            return torch.zeros_like(self.parameter, dtype=self.master.dtype)
        return gradient

    def accumulate_wide(self) -> None:
        """Add each micro-batch's 16-bit gradient into a wide one, so that small parts are not rounded away."""

        # torch's collector does not see through a parameter's hooks: a cycle of them would never be freed.
        own = weakref.ref(self)

        def add(parameter: torch.Tensor) -> None:
            slot = own()
            if slot is None:
                return
            assert parameter.grad is not None
            if slot.gradient is None:
                slot.gradient = parameter.grad.float()
            else:
                slot.gradient.add_(parameter.grad)
            parameter.grad = None

        self.parameter.register_post_accumulate_grad_hook(add)


@dataclass(frozen=True)
class Replicas:
    """Ranks that hold the same parts of some parameters and compute other tokens.

    Attributes:
        axes: of the mesh, along which they are; those of one rank left out.
        other_axes: along which ranks of the same stage hold other parts of these parameters: tp; of experts those
            over which they are spread.
        group: these ranks; `None` when this one is alone.
        size: how many they are.
        index: which of them this rank is.
        is_sharded: each of them updates its rows only.
    """

    axes: tuple[str, ...]
    other_axes: tuple[str, ...]
    group: dist.ProcessGroup | None
    size: int
    index: int
    is_sharded: bool

    @classmethod
    def create(cls, mesh: ParallelMesh, axes: tuple[str, ...]) -> "Replicas":
        """Look up the ranks along some axes of the mesh."""
        layout = mesh.layout
        spanned = layout.spanned(*axes)
        others = tuple(axis for axis in layout.spanned("replicas", "tp") if axis not in spanned)
        size = layout.size(*axes)
        is_sharded = layout.sharded_optimizer and size > 1
        return cls(spanned, others, mesh.group(*axes), size, mesh.index(*axes), is_sharded)

    def rows(self, parameter: torch.Tensor) -> slice:
        """Return the rows of a parameter that this rank updates."""
        return self._rows_of(parameter, self.index) if self.is_sharded else slice(0, parameter.shape[0])

    def start_sums(self, slots: list[ParameterSlot]) -> FinishSums:
        """Start to sum the gradients of some parameters over these ranks."""
        masters = [slot.master for slot in slots]
        if self.group is None:
            gradients = [slot.take_gradient() for slot in slots]
            return lambda: gradients
        if self.is_sharded:
            finish = start_reduce_scatter_sum(_message(slots, self._shares(slots)), self.group)
        else:
            finish = start_all_reduce_sum(_message(slots, [[slice(None)] * len(slots)])[0], self.group)
        return lambda: views(finish(), masters)

    def start_publish(self, slots: list[ParameterSlot]) -> Callable[[], None] | None:
        """Start to give all of these ranks the rows of some parameters that each of them updated.

        Returns:
            Waits for the rows of others and takes them over; `None` where this rank has all.
        """
        if self.group is None or not self.is_sharded:
            return None
        shares = self._shares(slots)
        parameters = [slot.parameter.detach() for slot in slots]
        mine = _join(parameters, shares[self.index], _longest(parameters, shares))
        finish = start_all_gather_rows(mine, self.group)

        def take() -> None:
            for rank, row in enumerate(finish()):
                if rank != self.index:
                    split(row, parameters, shares[rank])

        return take

    def _rows_of(self, parameter: torch.Tensor, index: int) -> slice:
        return chunk_range(parameter.shape[0], self.size, index)

    def _shares(self, slots: list[ParameterSlot]) -> list[list[slice]]:
        """Return by rank which rows of each parameter it updates."""
        return [[self._rows_of(slot.parameter, index) for slot in slots] for index in range(self.size)]


def _message(slots: list[ParameterSlot], shares: list[list[slice]]) -> torch.Tensor:
    """Concatenate the gradients of some parameters, a row for each share, shorter ones padded with zeros.

    Each gradient is freed as soon as the message has it.
    """
    length = _longest([slot.parameter for slot in slots], shares)
    message = slots[0].master.new_zeros(len(shares), length)
    ends = [0] * len(shares)
    for number, slot in enumerate(slots):
        gradient = slot.take_gradient()
        for share, rows in enumerate(shares):
            part = gradient[rows[number]]
            start, ends[share] = ends[share], ends[share] + part.numel()
            message[share, start : ends[share]].view_as(part).copy_(part)
    return message


def _longest(tensors: list[torch.Tensor], shares: list[list[slice]]) -> int:
    """Return the most elements that any share holds."""
    return max(
        sum(tensor[part].numel() for tensor, part in zip(tensors, rows, strict=True)) for rows in shares
    )


def _join(tensors: list[torch.Tensor], rows: list[slice], length: int) -> torch.Tensor:
    """Concatenate rows of each tensor, padded with zeros up to a length."""
    flat = torch.cat([tensor[part].flatten() for tensor, part in zip(tensors, rows, strict=True)])
    return torch.nn.functional.pad(flat, (0, length - flat.numel()))


def views(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parts of a flat tensor, in the shapes of other tensors."""
    used = flat[: sum(tensor.numel() for tensor in like)]
    parts = used.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def split(flat: torch.Tensor, tensors: list[torch.Tensor], rows: list[slice]) -> None:
    """Write what was concatenated into rows of each tensor."""
    start = 0
    for tensor, part in zip(tensors, rows, strict=True):
        target = tensor[part]
        target.copy_(flat[start : start + target.numel()].view_as(target))
        start += target.numel()
