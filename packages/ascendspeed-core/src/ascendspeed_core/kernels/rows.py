"""How many rows a matrix product should have."""

import torch


def rows_to_compute(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many rows to compute where `rows` are wanted; the rest is padding.

    On a CPU torch 2.13 has a matrix-vector product of its own for one row of bf16, and oneDNN's matrix product for
    more: two rows take 10 to 25 % less time than one, whatever the shape (`benchmarks/infer.py`).
    """
    return 2 if rows == 1 and dtype == torch.bfloat16 and device.type == "cpu" else rows
