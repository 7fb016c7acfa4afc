"""Plain operators that torch.compile turns into one kernel each: what they read is read once, forward and backward.

Shapes: B batch, S sequence, N query heads, K key-value heads, D head size, F inner size, T tokens, V
vocabulary.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ascendspeed_core.kernels import reference


def rotate_both(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.reference.rotate_both`: [B, S, N, D] and [B, S, K, D]."""
    turned: tuple[torch.Tensor, torch.Tensor] = _compiled(reference.rotate_both)(q, k, cos, sin)
    return turned


def silu_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `kernels.reference.silu_gated`: [B, S, F]."""
    gated: torch.Tensor = _compiled_for_width(reference.silu_gated)(gate, up)
    return gated


def silu_gated_joined(joined: torch.Tensor) -> torch.Tensor:
    """See `kernels.reference.silu_gated_joined`: [B, S, 2F]. Its gradient is written in one piece, too."""
    gated: torch.Tensor = _compiled_for_width(reference.silu_gated_joined)(joined)
    return gated


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """See `kernels.reference.token_losses`; 16-bit logits are widened on the way: [T, V] -> [T]."""
    losses: torch.Tensor = _compiled(_widened_losses)(logits, targets)
    return losses


def _widened_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return reference.token_losses(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


@cache
def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Compile an operator once, for batches and lengths of any size; the compiler takes seconds to import."""
    return torch.compile(plain, dynamic=True)


@cache
def _compiled_for_width(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Compile an operator for the first shape, and once more if the number of tokens changes.

    A width that is known lets the kernel read whole vectors, which is faster.
    """
    return torch.compile(plain)
