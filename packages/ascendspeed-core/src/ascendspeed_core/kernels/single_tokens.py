"""Attention of single new tokens in C++ for a CPU, without gradients: one call for all texts of a pass.

Shapes: M tokens of a pass, N query heads, K key-value heads, C tokens of the cache, D head size, T texts.
"""

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ascendspeed_core.device import Device
from ascendspeed_core.kernels.cpp_library import CannotCompileError, compiled

logger = logging.getLogger(__name__)

FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LANES, LARGEST_HEAD = 16, 256
"""Sizes of heads that attention takes: multiples up to the largest."""


@dataclass(frozen=True)
class SingleTokens:
    """New tokens of texts, one for each.

    Attributes:
        rows: where each token is among those of the pass, int64, [T].
        firsts: where each text begins in the cache, int64, [T].
        counts: how many tokens each text has with the new one, int64, [T].
    """

    rows: torch.Tensor
    firsts: torch.Tensor
    counts: torch.Tensor


TokenAttention = Callable[..., None]
"""`attend_tokens` for one size of heads and one scale."""


class _Given(ctypes.Structure):
    """`Tokens` of cpp/single_tokens.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "keys", "values", "out")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("q", "k", "v", "out", "head")),
        *((name, ctypes.c_void_p) for name in ("rows", "firsts", "counts")),
        *((name, ctypes.c_int64) for name in ("texts", "heads", "per_head", "window")),
        ("scale", ctypes.c_float),
    )


def token_attention(
    device: Device, dtype: torch.dtype, head_dim: int, changes_scores: bool, scale: float | None = None
) -> TokenAttention | None:
    """Return what attends to the texts of single tokens in one call; `None` where each needs a call of its own.

    Args:
        device: of the cache.
        dtype: of what is kept there.
        head_dim: D.
        changes_scores: scores are more than products and their scale, as with ALiBi, soft-capping or sinks.
        scale: factor of the scores, by default 1 / sqrt(D).
    """
    is_taken = dtype in FORMATS and head_dim % LANES == 0 and head_dim <= LARGEST_HEAD and not changes_scores
    if device.kind != "cpu" or not is_taken:
        return None
    try:
        function = getattr(_library(head_dim), f"attend_tokens_{FORMATS[dtype]}")
    except CannotCompileError as error:
        logger.warning("each text has a call of its own for the attention of its next token: %s", error)
        return None
    function.restype = None
    return partial(attend_tokens, function, head_dim**-0.5 if scale is None else scale)


def why_not() -> str | None:
    """Say why no such attention can be made on this machine; `None` if it can."""
    try:
        _library(LANES)
    except CannotCompileError as error:
        return str(error)
    return None


def _library(head_dim: int) -> ctypes.CDLL:
    return compiled("single_tokens.cpp", f"-DHEAD_DIM={head_dim}", "-ffp-contract=fast")


def attend_tokens(
    function: Any,
    scale: float,
    q: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor],
    cache: tuple[torch.Tensor, torch.Tensor],
    tokens: SingleTokens,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """Store keys and values of new tokens, and attend to the texts that they continue.

    Args:
        function: of the library, for the format.
        scale: factor of the scores.
        q: of all tokens of the pass, [M, N, D].
        new: their keys and values, [M, K, D].
        cache: what is kept of the texts, [K, C, D].
        tokens: those of `q` that this is for; each is the only one of its text in the pass.
        window: tokens that a query sees, its own included; `None` for all.
        out: gets the rows of these tokens, [M, N, D].
    """
    k, v = new
    q, k, v = _with_whole_heads(q), _with_whole_heads(k), _with_whole_heads(v)
    keys, values = cache
    heads = keys.shape[0]
    given = _Given(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(),
        q.stride(0), k.stride(0), v.stride(0), out.stride(0), keys.stride(0),
        tokens.rows.data_ptr(), tokens.firsts.data_ptr(), tokens.counts.data_ptr(),
        len(tokens.rows), heads, q.shape[1] // heads, window or 0, scale,
    )  # fmt: skip
    function(ctypes.byref(given))


def _with_whole_heads(x: torch.Tensor) -> torch.Tensor:
    """Return heads of each token that lie side by side: [M, N, D]."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
