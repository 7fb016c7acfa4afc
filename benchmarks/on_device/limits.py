"""What the device itself reaches: the figures that training and decoding are held against."""

from typing import Any

import torch

from on_device.setting import Setting


def bandwidth(setting: Setting) -> dict[str, Any]:
    """Return the bytes per second of a large copy, those read and those written together; and of a reading alone."""
    size = 1 << 22 if setting.is_small else 1 << 31
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=setting.device.torch).normal_()
    target = torch.empty_like(source)
    copied = 2 * size / setting.seconds(lambda: target.copy_(source))
    # The product of a matrix with one row reads all of it and writes next to nothing.
    matrix, row = (
        source.view(-1, 4096 if not setting.is_small else 64),
        target[: 4096 if not setting.is_small else 64],
    )
    read = size / setting.seconds(lambda: torch.nn.functional.linear(row, matrix))
    return {"copy GB/s": copied / 1e9, "matrix-vector GB/s": read / 1e9}


def product(setting: Setting) -> dict[str, Any]:
    """Return the operations per second of a large product of drawn numbers."""
    size = 256 if setting.is_small else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=setting.device.torch) for _ in range(2))
    reached = 2 * size**3 / setting.seconds(lambda: a @ b) / 1e12
    peak = setting.device.peak_flops("bfloat16")
    return {"bfloat16 TFLOP/s": reached, "stated TFLOP/s": peak / 1e12 if peak else None}
