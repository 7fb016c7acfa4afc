"""What the device itself reaches: the figures that training and decoding are held against."""

from collections.abc import Callable
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


def grouped_product(setting: Setting) -> dict[str, Any]:
    """Return the operations per second of products of 8,192 rows with the weights of 8 experts, and back."""
    from ascendspeed_core.kernels.registry import KernelContext, choose

    rows, size, inner, experts = (64, 32, 48, 4) if setting.is_small else (8192, 4096, 14_336, 8)
    device = setting.device.torch
    product = choose("grouped_product", "auto", KernelContext(setting.device, torch.bfloat16))[0]
    x = torch.randn(rows, size, dtype=torch.bfloat16, device=device).requires_grad_()
    weights = [
        torch.randn(inner, size, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(experts)
    ]
    counts = [rows // experts] * experts

    def step() -> None:
        product.run(x, weights, counts).sum().backward()

    seconds = setting.seconds(step, 3, 2)
    return {
        f"products of {experts} experts, {product.name}, TFLOP/s": 6 * rows * size * inner / seconds / 1e12
    }


def loss(setting: Setting) -> dict[str, Any]:
    """Return time and memory of head and loss, forward and backward, at Qwen's vocabulary: with logits and without."""
    from ascendspeed_core.kernels.compiled import token_losses as compiled
    from ascendspeed_core.kernels.reference import token_losses
    from ascendspeed_core.parallel.cross_entropy import LogitsRule, cross_entropy, hidden_cross_entropy

    tokens, size, vocab = (16, 64, 500) if setting.is_small else (8192, 4096, 151_936)
    device = setting.device.torch
    hidden = torch.randn(tokens, size, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = (torch.randn(vocab, size, dtype=torch.bfloat16, device=device) / 64).requires_grad_()
    targets = torch.randint(vocab, (tokens,), device=device)
    whole = compiled if setting.device.kind == "cuda" else token_losses
    ways = {
        "logits": lambda: cross_entropy(hidden @ weight.T, targets, vocab, None, whole),
        "hidden states": lambda: hidden_cross_entropy(
            hidden, weight, None, targets, vocab, None, LogitsRule()
        ),
    }
    found: dict[str, Any] = {}
    for name, losses in ways.items():
        setting.free()

        def step(losses: Callable[[], torch.Tensor] = losses) -> None:
            hidden.grad = weight.grad = None
            losses().mean().backward()

        found[f"loss from {name} ms"] = setting.seconds(step, 3, 2) * 1e3
        found[f"loss from {name} GB"] = setting.device.peak_memory_bytes() / 1e9
    return found
