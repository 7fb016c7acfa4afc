"""Causal attention of whole texts in C++ for a CPU, forward and backward, without all scores in memory.

Shapes: B batch, N query heads, K key-value heads, S queries, T keys (the last S of them belong to the queries), D head
size.
"""

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ascendspeed_core.kernels.cpp_library import CannotCompileError, compiled
from ascendspeed_core.kernels.fused_attention import causal_attention
from ascendspeed_core.kernels.mask_rule import MaskRule, attend_to_texts
from ascendspeed_core.kernels.reference import Mask
from ascendspeed_core.kernels.single_tokens import FORMATS, LANES, LARGEST_HEAD


class _Heads(ctypes.Structure):
    """`Heads` of cpp/attention.cpp."""

    _fields_ = (("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "row")))


class _Given(ctypes.Structure):
    """`Attention` of cpp/attention.cpp."""

    _fields_ = (
        *((name, _Heads) for name in ("q", "k", "v", "out", "of_out", "of_q", "of_k", "of_v")),
        ("log_sums", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batches", "heads", "per_head", "queries", "keys", "window")),
        ("scale", ctypes.c_float),
    )


def native_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float | None = None
) -> torch.Tensor:
    """Do what `fused_attention.causal_attention` does: C++ for several queries, whole texts and windows, else torch.

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D] with T >= S.
        v: [B, K, T, D].
        mask: which keys are seen, or what is added.
        scale: factor of the scores, by default 1 / sqrt(D).

    Returns:
        [B, N, S, D].
    """
    rule = mask if isinstance(mask, MaskRule) and mask.slopes is None else None
    is_taken = (mask is None or rule is not None) and q.shape[2] > 1 and v.shape == k.shape
    if not is_taken or why_not(q.dtype, q.shape[-1]) is not None:
        return causal_attention(q, k, v, mask, scale)
    if rule is not None and rule.lengths:
        return attend_to_texts(partial(native_attention, scale=scale), q, k, v, rule)
    window = 0 if rule is None or rule.window is None else rule.window
    out: torch.Tensor = attend(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, window)[0]
    return out


def why_not(dtype: torch.dtype, head_dim: int) -> str | None:
    """Say why a format or a size of heads has no such attention on this machine; `None` if it has."""
    if dtype not in FORMATS:
        return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % LANES or head_dim > LARGEST_HEAD:
        return f"it takes heads of a multiple of {LANES} up to {LARGEST_HEAD}, not of {head_dim}"
    try:
        _library(head_dim)
    except CannotCompileError as error:
        return str(error)
    return None


# An operator of its own, so that selective recompute can keep what it gives.
@torch.library.custom_op("ascendspeed::native_attention", mutates_args=())
def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is attended, [B, N, S, D], and the logarithm of the softmax's sum, fp32, [B, N, S].

    Args:
        q: [B, N, S, D].
        k: [B, K, T, D].
        v: [B, K, T, D].
        scale: factor of the scores.
        window: keys that a query sees, its own included; 0 for all.
    """
    q, k, v = (_with_whole_heads(x) for x in (q, k, v))
    out, log_sums = _like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)
    _call("forward", (q, k, v, out), log_sums, scale, window)
    return out, log_sums


@attend.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, of_out: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
    if of_out is None:
        return None, None, None, None, None
    q, k, v, out, log_sums = ctx.saved_tensors
    q, k, v, out, of_out = (_with_whole_heads(x) for x in (q, k, v, out, of_out))
    of_q, of_k, of_v = _like(q), _like(k), _like(v)
    _call("backward", (q, k, v, out, of_out, of_q, of_k, of_v), log_sums, ctx.scale, ctx.window)
    return of_q, of_k, of_v, None, None


attend.register_autograd(_backward, setup_context=_keep)

NATIVE_OPERATOR = torch.ops.ascendspeed.native_attention.default
"""What a trace of operators shows of it."""


def _call(
    direction: str, heads: Sequence[torch.Tensor], log_sums: torch.Tensor, scale: float, window: int
) -> None:
    """Call the library with q, k, v, out and, for a backward, the gradients of out, q, k and v."""
    q, k = heads[:2]
    views = [_Heads(x.data_ptr(), *x.stride()[:3]) for x in heads]
    views += [_Heads()] * (8 - len(views))
    batches, num_heads, queries, head_dim = q.shape
    given = _Given(
        *views,
        log_sums.data_ptr(),
        batches,
        num_heads,
        num_heads // k.shape[1],
        queries,
        k.shape[2],
        window,
        scale,
    )
    function = getattr(_library(head_dim), f"{direction}_{FORMATS[q.dtype]}")
    function.restype = None
    function(ctypes.byref(given))


def _library(head_dim: int) -> ctypes.CDLL:
    return compiled("attention.cpp", f"-DHEAD_DIM={head_dim}", "-ffp-contract=fast")


def _with_whole_heads(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor whose heads are neighbours in memory: [B, N, S, D]."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _like(x: torch.Tensor) -> torch.Tensor:
    """Return room for as many heads, those of a token side by side: [B, N, S, D]."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
