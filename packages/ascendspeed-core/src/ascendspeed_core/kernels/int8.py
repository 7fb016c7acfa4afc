"""The product with weights of 8-bit integers: by the device's own operator, or by weights made wide again.

Shapes: M rows of activations, K input and N output size of a layer.
"""

import threading
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F

from ascendspeed_core.device import Device
from ascendspeed_core.kernels.npu import npu_int8_linear
from ascendspeed_core.kernels.onednn import has_packed_product, packed_linear
from ascendspeed_data.errors import ConfigError

Int8Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""An implementation of `kernels.reference.int8_linear`, for activations of two dimensions."""

FORMATS = {
    "npu": (torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float32),
    "cpu": (torch.bfloat16, torch.float32),
}
"""Formats of activations and scales in which each kind of device has the product."""

INTEGER_ROWS = 16
"""On a CPU torch's operator is the faster one in bfloat16 up to this many rows; in float32 it is scalar and never is
(`benchmarks/quantization.py`)."""

INTEGER_COLUMNS = 16
"""On a CPU torch's operator reads this many numbers at once, and past the end of a row that they do not divide."""

ALIGNED_BYTES = 64
"""On a CPU torch's operator ends the process where activations begin elsewhere than storage of their own does."""

WIDE_BYTES = 1 << 23
"""So much of a weight is made wide at once: it stays in a CPU's cache."""


class Workspace(threading.local):
    """Where a block of a weight is made wide, on each thread its own; the layers of a model share it.

    Memory that is asked for anew at each product has to be given pages by the system first, which can take as long as
    the product.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def block(self, rows: int, columns: int, x: torch.Tensor) -> torch.Tensor:
        """Return memory in the format of `x`, [rows, columns]; what was in it is lost."""
        size, memory = rows * columns, self._memory
        if memory is None or len(memory) < size or (memory.dtype, memory.device) != (x.dtype, x.device):
            # Made in inference mode it could not be written to outside of it.
            with torch.inference_mode(False):
                memory = self._memory = x.new_empty(max(size, WIDE_BYTES // x.itemsize))
        return memory[:size].view(rows, columns)


def refuse_missing_format(dtype: torch.dtype, device: Device) -> None:
    """Raise `ConfigError` where a device has no product of int8 weights with activations of a format."""
    if dtype not in FORMATS[device.kind]:
        able = " or ".join(_name(one) for one in FORMATS[device.kind])
        raise ConfigError(
            f"weight_quantization=int8 computes in {able} on {device.kind}, not in dtype={_name(dtype)}; give another "
            "--dtype, or leave --weight-quantization out"
        )


def int8_linear(
    x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, workspace: Workspace | None = None
) -> torch.Tensor:
    """Return the product with a weight of integers, see `kernels.reference.int8_linear`: [..., K] -> [..., N].

    Args:
        x: activations, [..., K].
        integers: int8, [N, K].
        scale: of each row, in the format of `x`, [N].
        workspace: kept between products.
    """
    rows = x.reshape(-1, x.shape[-1])
    name = implementation_for(rows, integers)
    if name == "wide":
        out = wide_linear(rows, integers, scale, workspace)
    else:
        out = IMPLEMENTATIONS[name](rows, integers, scale)
    return out.view(*x.shape[:-1], -1)


def implementation_for(rows: torch.Tensor, integers: torch.Tensor) -> str:
    """Return the name of the implementation that a product takes.

    Args:
        rows: activations, [M, K].
        integers: int8, [N, K].
    """
    kind = rows.device.type
    if 0 in (*rows.shape, *integers.shape):
        return "wide"
    if kind == "npu":
        return "npu"
    if kind == "cuda":
        return "integer"
    is_fast = rows.dtype == torch.bfloat16 and len(rows) <= INTEGER_ROWS
    return "integer" if is_fast and integers.shape[1] % INTEGER_COLUMNS == 0 else "wide"


def integer_linear(x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return what torch's own operator gives: each integer is read once and never written wide."""
    x = x.contiguous()
    if x.data_ptr() % ALIGNED_BYTES:
        x = x.clone()
    return torch._weight_int8pack_mm(x, integers, scale)


def wide_linear(
    x: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, workspace: Workspace | None = None
) -> torch.Tensor:
    """Return the product with integers in the format of the activations, block by block of their rows."""
    is_onednn = has_packed_product(x.dtype, x.device) and 0 not in (*x.shape, *integers.shape)
    multiply = partial(packed_linear, bias=None) if is_onednn else F.linear
    block = max(WIDE_BYTES // max(integers.shape[1] * x.itemsize, 1), 1)
    wide = (workspace or Workspace()).block(min(block, len(integers)), integers.shape[1], x)
    parts = [multiply(x, wide[: len(part)].copy_(part)) for part in integers.split(block)]
    return torch.cat(parts, -1).mul_(scale)


IMPLEMENTATIONS: Mapping[str, Int8Linear] = {
    "npu": npu_int8_linear,
    "integer": integer_linear,
    "wide": wide_linear,
}
"""All give what the reference gives."""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
