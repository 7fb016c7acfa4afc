"""Tokens sorted by their experts and back, and products with the weights of many experts.

This is the only place that reorders tokens. Both ways know their gradient, which is the other way: no gradient is
added up in an order that chance decides.

Shapes: T tokens, K experts of each, N = T K rows, E experts, H hidden size, I input and O output size of a product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class RowOrder:
    """An order of rows, and the way back.

    Attributes:
        order: number of the row that comes to each position, [N].
        inverse: position to which each row comes, [N].
        counts: rows of each group, [E].
    """

    order: torch.Tensor
    inverse: torch.Tensor
    counts: torch.Tensor

    def sort(self, rows: torch.Tensor) -> torch.Tensor:
        """Bring rows into this order: [N, H] -> [N, H]."""
        ordered: torch.Tensor = _Reorder.apply(rows, self.order, self.inverse)
        return ordered

    def restore(self, rows: torch.Tensor) -> torch.Tensor:
        """Bring rows back from this order: [N, H] -> [N, H]."""
        restored: torch.Tensor = _Reorder.apply(rows, self.inverse, self.order)
        return restored


def order_by_group(groups: torch.Tensor, num_groups: int) -> RowOrder:
    """Return the order in which rows of the same group stand together, in the order that they had.

    Args:
        groups: of each row, [N], from 0 to `num_groups` - 1.
        num_groups: E.
    """
    order = groups.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return RowOrder(order, inverse, groups.bincount(minlength=num_groups))


def pad_groups(rows: torch.Tensor, counts: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill groups of rows that stand together up to one length, with zeros.

    Args:
        rows: [N, H].
        counts: rows of each group, [E], none above `length`.
        length: of every group, P.

    Returns:
        The groups, [E P, H], and where in them each row is, [N].
    """
    groups = torch.arange(len(counts), device=rows.device)
    gaps = groups * length - (counts.cumsum(0) - counts)
    positions = torch.arange(len(rows), device=rows.device) + gaps.repeat_interleave(counts)
    return rows.new_zeros(len(counts) * length, rows.shape[1]).index_copy(0, positions, rows), positions


PermuteFunction = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, RowOrder]]
"""An implementation of `permute_tokens`."""

UnpermuteFunction = Callable[[torch.Tensor, torch.Tensor, RowOrder], torch.Tensor]
"""An implementation of `unpermute_tokens`."""


def permute_tokens(
    tokens: torch.Tensor, chosen: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, RowOrder]:
    """Return a row for each token and expert of it, those of the first expert first.

    Args:
        tokens: [T, H].
        chosen: experts of each token, [T, K].
        num_experts: E.

    Returns:
        Rows, [N, H], and their order.
    """
    order = order_by_group(chosen.flatten(), num_experts)
    rows: torch.Tensor = _Spread.apply(tokens, order.order, order.inverse, chosen.shape[1])
    return rows, order


def unpermute_tokens(rows: torch.Tensor, weights: torch.Tensor, order: RowOrder) -> torch.Tensor:
    """Return for each token the weighted sum of what its experts gave, in the format of `rows`.

    Args:
        rows: of all experts, [N, H].
        weights: of each token's experts, fp32 or float64, [T, K].
        order: of the rows.

    Returns:
        [T, H].
    """
    of_tokens = order.restore(rows).unflatten(0, weights.shape)
    # One fixed order of the sum, in the format of the weights: a token's result does not depend on its company.
    summed: torch.Tensor = (of_tokens * weights.unsqueeze(-1)).sum(1).to(rows.dtype)
    return summed


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0][inverse], None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, copies: int
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return tokens[order // copies]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradients[0][inverse].unflatten(0, (-1, ctx.copies)).sum(1), None, None, None


GroupedProduct = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[int]], torch.Tensor]
"""An implementation of `grouped_product`."""


def grouped_product(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int]
) -> torch.Tensor:
    """Multiply the rows of each expert with its weight, one after the other.

    Args:
        rows: [N, I], those of the first expert first.
        weights: of each expert, [O, I].
        counts: rows of each expert; they add up to N.

    Returns:
        [N, O].
    """
    # Experts without rows take part, so that their gradients are zero and not absent.
    parts = [F.linear(part, weight) for part, weight in zip(rows.split(list(counts)), weights, strict=True)]
    return torch.cat(parts)


def torch_grouped_product(
    rows: torch.Tensor, weights: Sequence[torch.Tensor], counts: Sequence[int]
) -> torch.Tensor:
    """`grouped_product` by torch's `grouped_mm`: one kernel for all experts; the weights are copied side by side."""
    ends = torch.tensor(counts, device=rows.device).cumsum(0).to(torch.int32)
    product: torch.Tensor = F.grouped_mm(rows, torch.stack(list(weights)).transpose(1, 2), offs=ends)
    return product
