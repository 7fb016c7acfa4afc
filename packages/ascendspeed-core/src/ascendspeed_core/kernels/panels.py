"""Matrix products in C++ for a CPU, with weights that lie in panels; no gradient flows.

A decoding pass reads every weight for a few rows. A panel is what a processor reads from one end to the other while
the sums of 8 rows stay in its registers; it lies in large pages (`kernels.huge_pages`). Beside oneDNN's packed product
one row takes 0.4 to 0.6 of the time, 16 rows 0.8, and thousands the same (`benchmarks/products.py`).

Shapes: O output and I input size of a layer.
"""

import ctypes
from functools import cache
from typing import Any

import torch

from ascendspeed_core.kernels.cpp_library import CannotCompileError, compiled
from ascendspeed_core.kernels.huge_pages import HugePages
from ascendspeed_core.kernels.single_tokens import FORMATS


class _Given(ctypes.Structure):
    """`Product` of cpp/product.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "panels", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "stride")),
    )


class Panels:
    """A weight in panels.

    Args:
        weight: of `FORMATS`, on a CPU, for which `why_not` has nothing to say; [O, I].
        memory: where its numbers go.

    Attributes:
        shape: O and I.
        dtype: of its numbers.
        nbytes: those of the weight; panels may hold a few more.
    """

    def __init__(self, weight: torch.Tensor, memory: HugePages) -> None:
        self.shape, self.dtype, self.nbytes = weight.shape, weight.dtype, weight.nbytes
        library, name = _library(), FORMATS[weight.dtype]
        width = library.panel_width()
        outputs, self._inputs = weight.shape
        self._outputs = outputs
        self._memory = memory.take(-(-outputs // width) * width * self._inputs, weight.dtype)
        self._panels = self._memory.data_ptr()
        weight = weight.detach().contiguous()
        getattr(library, f"pack_{name}")(weight.data_ptr(), self._panels, outputs, self._inputs)
        self._multiply, self._unpack = (
            getattr(library, f"multiply_{name}"),
            getattr(library, f"unpack_{name}"),
        )

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x @ weight.T + bias`: [..., I] -> [..., O].

        Args:
            x: [..., I].
            bias: [O].
        """
        if x.dtype != self.dtype or x.shape[-1] != self._inputs or not x.is_cpu:
            raise ValueError(
                f"a packed weight of {self.dtype}, {list(self.shape)}, does not multiply {x.dtype}, "
                f"{list(x.shape)}, on {x.device}"
            )
        if bias is not None and (
            bias.dtype != self.dtype or bias.shape != self.shape[:1] or bias.stride(0) != 1
        ):
            raise ValueError(
                f"the bias of a packed weight of {self.dtype}, {list(self.shape)}, is {bias.dtype}, {list(bias.shape)}"
            )
        rows = x if x.dim() == 2 else x.reshape(-1, self._inputs)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        out = x.new_empty(*x.shape[:-1], self._outputs)
        given = _Given(
            rows.data_ptr(), self._panels, bias.data_ptr() if bias is not None else None, out.data_ptr(),
            len(rows), self._inputs, self._outputs, rows.stride(0),
        )  # fmt: skip
        self._multiply(ctypes.byref(given))
        return out

    def plain(self) -> torch.Tensor:
        """Return a copy of the weight as torch lays it out, [O, I]."""
        weight = torch.empty(self.shape, dtype=self.dtype)
        self._unpack(self._panels, weight.data_ptr(), self._outputs, self._inputs)
        return weight


def why_not(dtype: torch.dtype, inputs: int) -> str | None:
    """Say why weights of a format and a number of inputs have no panels on this machine; `None` if they have."""
    if dtype not in FORMATS:
        return f"they take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if dtype == torch.bfloat16:
        if not torch.cpu._is_avx512_bf16_supported():
            return "this processor has no products of bfloat16 in AVX-512"
        if torch.cpu._is_amx_tile_supported():
            return "oneDNN uses this processor's tiles (AMX)"
        if inputs % 2:
            return f"bfloat16 is multiplied in pairs, a row has {inputs} numbers"
    try:
        library = _library()
    except CannotCompileError as error:
        return str(error)
    if not hasattr(library, f"multiply_{FORMATS[dtype]}"):
        return "the compiler knows no products of bfloat16 in AVX-512"
    return None


@cache
def _library() -> Any:
    library = compiled("product.cpp", "-ffp-contract=fast")
    library.panel_width.restype = ctypes.c_int64
    for name in FORMATS.values():
        for function, kinds in (
            ("multiply", (ctypes.c_void_p,)),
            ("pack", (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
            ("unpack", (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)),
        ):
            if hasattr(library, f"{function}_{name}"):
                found = getattr(library, f"{function}_{name}")
                found.argtypes, found.restype = kinds, None
    return library
