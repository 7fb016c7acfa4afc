"""RMSNorm, rotary embedding and SwiGLU in C++ for a CPU, forward and backward, each in one pass over memory.

In bf16 every operation is rounded where the plain implementations round it. Where no gradient is needed, a call goes
straight to the library: in decoding, operators are so short that what leads to them takes most of the time.

Shapes: B batch, S sequence, H hidden size, N query heads, K key-value heads, D head size, F inner size.
"""

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ascendspeed_core.kernels import reference
from ascendspeed_core.kernels.cpp_library import CannotCompileError, compiled
from ascendspeed_core.kernels.single_tokens import FORMATS

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)
_POINTER, _INTEGER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_ROWS = (_POINTER, _INTEGER, _INTEGER, _INTEGER)
_ROW = (_POINTER, _INTEGER)
_HEADS = (_POINTER, _POINTER, _INTEGER, _INTEGER, _INTEGER, _INTEGER)
_ARGUMENTS = {
    "rms_norm": (*_ROWS, _POINTER, _POINTER, _POINTER, _INTEGER, _INTEGER, _FLOAT),
    "rms_norm_backward": (*_ROWS, _POINTER, *_ROWS, _POINTER, _POINTER, _POINTER, _INTEGER, _INTEGER),
    "rotate": (*_HEADS, *_HEADS, _POINTER, _POINTER, *[_INTEGER] * 5, ctypes.c_int32),
    "gated": (*_ROW, *_ROW, _POINTER, _INTEGER, _INTEGER),
    "gated_backward": (*_ROW, *_ROW, *_ROW, _POINTER, _POINTER, *[_INTEGER] * 3),
}
"""Of the functions of cpp/elementwise.cpp."""


class _Functions(NamedTuple):
    """Those of the library for one format."""

    rms_norm: Any
    rms_norm_backward: Any
    rotate: Any
    gated: Any
    gated_backward: Any


def native_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """See `kernels.reference.rms_norm`: [..., H] and [H] -> [..., H]."""
    functions = _functions_for(x, weight)
    if functions is None or weight.shape != x.shape[-1:]:
        return reference.rms_norm(x, weight, epsilon)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        normed: torch.Tensor = _RMSNorm.apply(x, weight, epsilon)
        return normed
    return _normalise(functions, x, weight, epsilon, None)


def native_rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.reference.rotate_both`: [B, S, N, D] and [B, S, K, D]."""
    functions = _functions_for(q, k, cos, sin)
    if functions is None or not _are_angles(q, k, cos, sin):
        return reference.rotate_both(q, k, cos, sin)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        if cos.requires_grad or sin.requires_grad:
            return reference.rotate_both(q, k, cos, sin)
        turned: tuple[torch.Tensor, torch.Tensor] = _Rotate.apply(q, k, cos, sin)
        return turned
    return _turn(functions, q, k, cos, sin, False)


def native_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `kernels.reference.silu_gated`: twice [..., F] -> [..., F]."""
    functions = _functions_for(gate, up)
    if functions is None or gate.shape != up.shape:
        return reference.silu_gated(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        gated: torch.Tensor = _Gated.apply(gate, up)
        return gated
    return _gate(functions, gate, up)


def native_gated_joined(joined: torch.Tensor) -> torch.Tensor:
    """See `kernels.reference.silu_gated_joined`: [..., 2F] -> [..., F]."""
    functions = _functions_for(joined)
    if functions is None or joined.shape[-1] % 2:
        return reference.silu_gated_joined(joined)
    if torch.is_grad_enabled() and joined.requires_grad:
        gated: torch.Tensor = _GatedJoined.apply(joined)
        return gated
    return _gate_joined(functions, joined)


def why_not(dtype: torch.dtype) -> str | None:
    """Say why a format has no such operators on this machine; `None` if it has."""
    if dtype not in FORMATS:
        return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        _library()
    except CannotCompileError as error:
        return str(error)
    return None


def _library() -> ctypes.CDLL:
    return compiled("elementwise.cpp", "-ffp-contract=fast")


@cache
def _functions(dtype: torch.dtype) -> _Functions | None:
    if why_not(dtype) is not None:
        return None
    found = []
    for name in _Functions._fields:
        function = getattr(_library(), f"{name}_{FORMATS[dtype]}")
        function.restype, function.argtypes = None, _ARGUMENTS[name]
        found.append(function)
    return _Functions(*found)


def _functions_for(*tensors: torch.Tensor) -> _Functions | None:
    """Return what computes with tensors; `None` where plain torch must: other kinds, mixed formats, no numbers."""
    dtype = tensors[0].dtype
    for x in tensors:
        if not x.is_cpu or x.dtype is not dtype or type(x) not in _PLAIN_TYPES or not x.numel():
            return None
    return None if torch.compiler.is_compiling() else _functions(dtype)


def _like(x: torch.Tensor) -> torch.Tensor:
    """Return room for as many numbers, side by side."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _merged(x: torch.Tensor) -> list[tuple[int, int]]:
    """Return lengths and strides of all dimensions but the last, in as few as there can be."""
    merged: list[tuple[int, int]] = []
    for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if length == 1:
            continue
        if merged and merged[-1][1] == length * stride:
            merged[-1] = (merged[-1][0] * length, stride)
        else:
            merged.append((length, stride))
    return merged


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """Return a tensor whose rows are in one piece each, how many follow each other by the inner stride, and strides.

    A copy is made only of rows that need more than two strides.
    """
    if not x.is_contiguous():
        merged = _merged(x)
        if x.stride(-1) == 1 and len(merged) <= 2:
            (_, outer), (length, inner) = [*[(1, 0)] * (2 - len(merged)), *merged]
            return x, length, outer, inner
        x = x.contiguous()
    return x, 1, x.shape[-1], 0


def _evenly(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return a tensor whose rows are in one piece each and evenly far apart, and how far."""
    if not x.is_contiguous():
        merged = _merged(x)
        if x.stride(-1) == 1 and len(merged) <= 1:
            return x, merged[0][1] if merged else 0
        x = x.contiguous()
    return x, x.shape[-1]


def _normalise(
    functions: _Functions,
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    factors: torch.Tensor | None,
) -> torch.Tensor:
    """Return `rms_norm`; `factors` gets what each row was multiplied with, fp32."""
    size = x.shape[-1]
    x, inner, outer_stride, inner_stride = _rows(x)
    weight = weight.contiguous()
    out = _like(x)
    functions.rms_norm(
        x.data_ptr(), inner, outer_stride, inner_stride, weight.data_ptr(), out.data_ptr(),
        None if factors is None else factors.data_ptr(), x.numel() // size, size, epsilon,
    )  # fmt: skip
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        functions = _functions(x.dtype)
        assert functions is not None
        factors = x.new_empty(x.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(x, weight, factors)
        return _normalise(functions, x, weight, epsilon, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, factors = ctx.saved_tensors
        functions, size = _functions(x.dtype), x.shape[-1]
        # Engines that part weights between forward and backward must have put them together again.
        assert functions is not None and weight.numel() == size
        of_x = _like(x)
        of_weight = weight.new_empty(size) if ctx.needs_input_grad[1] else None
        (x, *x_strides), (of_out, *of_strides) = _rows(x), _rows(of_out)
        weight = weight.contiguous()
        functions.rms_norm_backward(
            x.data_ptr(), *x_strides, weight.data_ptr(), of_out.data_ptr(), *of_strides, factors.data_ptr(),
            of_x.data_ptr(), None if of_weight is None else of_weight.data_ptr(), x.numel() // size, size,
        )  # fmt: skip
        return of_x, of_weight, None


def _are_angles(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether shapes are those of `native_rotate`, angles the same for all heads and, if so, for all of a batch."""
    batch, length, _, size = q.shape
    return (
        not size % 2
        and k.shape[:2] == q.shape[:2]
        and k.shape[3] == size
        and cos.shape == sin.shape
        and cos.shape in ((batch, length, 1, size), (1, length, 1, size))
    )


def _turn(
    functions: _Functions,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    is_back: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `rotate_both`, or the gradients of what it was given from those of what it gave."""
    batch, length, heads, size = q.shape
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    if cos.stride() != sin.stride() or cos.stride(3) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    q_out, k_out = _like(q), _like(k)
    angle_batch, angle_token = cos.stride()[:2]
    functions.rotate(
        q.data_ptr(), q_out.data_ptr(), heads, *q.stride()[:3], k.data_ptr(), k_out.data_ptr(), k.shape[2],
        *k.stride()[:3], cos.data_ptr(), sin.data_ptr(), angle_batch if len(cos) > 1 else 0, angle_token, batch,
        length, size, is_back,
    )  # fmt: skip
    return q_out, k_out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        functions = _functions(q.dtype)
        assert functions is not None
        ctx.save_for_backward(cos, sin)
        return _turn(functions, q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_q: torch.Tensor, of_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        functions = _functions(of_q.dtype)
        assert functions is not None
        return *_turn(functions, of_q, of_k, cos, sin, True), None, None


def _gate(functions: _Functions, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return `silu_gated`."""
    size = gate.shape[-1]
    (gate, gate_stride), (up, up_stride) = _evenly(gate), _evenly(up)
    out = _like(gate)
    functions.gated(
        gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, out.data_ptr(), out.numel() // size, size
    )
    return out


def _gate_joined(functions: _Functions, joined: torch.Tensor) -> torch.Tensor:
    """Return `silu_gated_joined`; views of the halves would take as long to make as the rest of a short call."""
    size = joined.shape[-1] // 2
    joined, stride = _evenly(joined)
    out = joined.new_empty((*joined.shape[:-1], size))
    gate = joined.data_ptr()
    up = gate + size * joined.element_size()
    functions.gated(gate, stride, up, stride, out.data_ptr(), out.numel() // size, size)
    return out


def _gate_back(
    gate: torch.Tensor,
    up: torch.Tensor,
    of_out: torch.Tensor,
    of_gate: torch.Tensor,
    of_up: torch.Tensor,
) -> None:
    """Write the gradients of gate and up, whose rows are as far apart as each other's."""
    functions, size = _functions(gate.dtype), gate.shape[-1]
    assert functions is not None
    (gate, gate_stride), (up, up_stride), (of_out, stride) = _evenly(gate), _evenly(up), _evenly(of_out)
    functions.gated_backward(
        gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, of_out.data_ptr(), stride, of_gate.data_ptr(),
        of_up.data_ptr(), _evenly(of_gate)[1], gate.numel() // size, size,
    )  # fmt: skip


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        functions = _functions(gate.dtype)
        assert functions is not None
        ctx.save_for_backward(gate, up)
        return _gate(functions, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = _like(gate), _like(up)
        _gate_back(gate, up, of_out, of_gate, of_up)
        return of_gate, of_up


class _GatedJoined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: torch.Tensor) -> torch.Tensor:
        functions = _functions(joined.dtype)
        assert functions is not None
        ctx.save_for_backward(joined)
        return _gate_joined(functions, joined)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: torch.Tensor) -> torch.Tensor:
        (joined,) = ctx.saved_tensors
        of_joined = _like(joined)
        (gate, up), (of_gate, of_up) = joined.chunk(2, dim=-1), of_joined.chunk(2, dim=-1)
        _gate_back(gate, up, of_out, of_gate, of_up)
        return of_joined
