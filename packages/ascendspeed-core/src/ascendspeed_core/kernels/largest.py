"""The largest number of each row, and where it stands.

Shapes: R rows, V numbers of a row.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from ascendspeed_core.kernels.cpp_library import CannotCompileError, compiled
from ascendspeed_core.kernels.single_tokens import FORMATS

BLOCK = 128
"""torch's argmax on a CPU looks at one number after the other, its amax at a vector of them: of 64 rows of 32,000 in
bf16 argmax takes 7 ms, the amax of blocks and the argmax of one block 1 ms, C++ 0.2 ms."""


def largest(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest number of each row and the first position where it stands; a NaN is larger than all numbers.

    Args:
        rows: alike, anywhere in memory, [V] each.

    Returns:
        Numbers and positions, [R] each.
    """
    first = rows[0]
    function = _function(first.dtype) if first.device.type == "cpu" and len(first) else None
    if function is None or any(row.stride(0) != 1 for row in rows):
        return largest_of_blocks(torch.stack(list(rows)))
    numbers, positions = first.new_empty(len(rows)), torch.empty(len(rows), dtype=torch.int64)
    pointers = (ctypes.c_void_p * len(rows))(*(row.data_ptr() for row in rows))
    function(pointers, len(rows), len(first), numbers.data_ptr(), positions.data_ptr())
    return numbers, positions


def largest_of_blocks(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `largest` does in plain torch: [R, V] -> [R] each."""
    count = rows.shape[1] // BLOCK * BLOCK
    if rows.device.type != "cpu" or not count:
        return rows.max(-1)
    blocks = rows[:, :count].unflatten(1, (-1, BLOCK))
    most = blocks.amax(-1)
    block = most.argmax(-1, keepdim=True)
    number = most.gather(1, block).squeeze(1)
    of_block = blocks.take_along_dim(block.unsqueeze(-1), 1).squeeze(1).argmax(-1)
    position = block.squeeze(1) * BLOCK + of_block
    if count == rows.shape[1]:
        return number, position
    other, at = rows[:, count:].max(-1)
    is_other = (other > number) | (other.isnan() & ~number.isnan())
    return torch.where(is_other, other, number), torch.where(is_other, at + count, position)


@cache
def _function(dtype: torch.dtype) -> Any:
    """Return the library's function for a format; `None` where there is none."""
    if dtype not in FORMATS:
        return None
    try:
        function = getattr(compiled("largest.cpp"), f"largest_{FORMATS[dtype]}")
    except CannotCompileError:
        # Decoding has said so (`kernels.single_tokens`).
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
    function.restype = None
    return function
