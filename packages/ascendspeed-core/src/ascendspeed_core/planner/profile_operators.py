"""Operators over memory for `planner.profile_device`: each with a forward, its backward, and its elements."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.device import Device
from ascendspeed_core.optim.update_rule import make_update_rule
from ascendspeed_core.parallel.cross_entropy import cross_entropy

HIDDEN = 256
HEAD = 64
VOCABULARY = 4096

Maker = Callable[[int, torch.dtype, Device], tuple[Callable[[], Any], Callable[[Any], Any], int]]


def _by_autograd(inputs: Sequence[torch.Tensor], run: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[Any], Any]]:  # fmt: skip  # noqa: E501
    """Return a forward, and the backward that autograd makes of it."""

    def backward(out: Any) -> None:
        outs = out if isinstance(out, tuple) else (out,)
        torch.autograd.grad(outs, inputs, [torch.ones_like(one) for one in outs])

    return run, backward


def operator_makers(kernels: dict[str, Any]) -> dict[str, Maker]:
    """Return by operator what makes its forward and backward for a number of elements.

    Args:
        kernels: implementations of norm, rotary embedding, gated activation, loss and attention, by operator.
    """

    def leaf(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> torch.Tensor:
        return torch.randn(shape, device=device.torch).to(dtype).requires_grad_()

    def norm(elements: int, dtype: torch.dtype, device: Device) -> Any:
        x, weight = leaf((elements // HIDDEN, HIDDEN), dtype, device), leaf((HIDDEN,), dtype, device)
        return *_by_autograd((x, weight), lambda: kernels["rms_norm"](x, weight, 1e-6)), elements

    def rotary(elements: int, dtype: torch.dtype, device: Device) -> Any:
        length = max(elements // (HIDDEN * 2), 8)
        q, k = (leaf((1, length, HIDDEN // HEAD, HEAD), dtype, device) for _ in range(2))
        table = torch.randn(1, length, 1, HEAD, device=device.torch).to(dtype)
        return *_by_autograd((q, k), lambda: kernels["rotary"](q, k, table, table)), 2 * length * HIDDEN

    def gated(elements: int, dtype: torch.dtype, device: Device) -> Any:
        gate, up = (leaf((elements // HIDDEN, HIDDEN), dtype, device) for _ in range(2))
        return *_by_autograd((gate, up), lambda: kernels["swiglu"](gate, up)), elements

    def activation(elements: int, dtype: torch.dtype, device: Device) -> Any:
        x = leaf((elements // HIDDEN, HIDDEN), dtype, device)
        return *_by_autograd((x,), lambda: F.gelu(x, approximate="tanh")), elements

    def add(elements: int, dtype: torch.dtype, device: Device) -> Any:
        x, y = (leaf((elements // HIDDEN, HIDDEN), dtype, device) for _ in range(2))
        # Both gradients of a residual are added up where its branches meet.
        return (lambda: x + y), (lambda out: out.detach() + out.detach()), elements

    def embedding(elements: int, dtype: torch.dtype, device: Device) -> Any:
        weight = leaf((VOCABULARY, HIDDEN), dtype, device)
        ids = torch.randint(VOCABULARY, (max(elements // HIDDEN, 1),), device=device.torch)
        return *_by_autograd((weight,), lambda: F.embedding(ids, weight)), elements

    def loss(elements: int, dtype: torch.dtype, device: Device) -> Any:
        tokens = max(elements // VOCABULARY, 1)
        logits = leaf((tokens, VOCABULARY), dtype, device)
        targets = torch.randint(VOCABULARY, (tokens,), device=device.torch)
        run = lambda: cross_entropy(logits, targets, VOCABULARY, None, kernels["cross_entropy"])  # noqa: E731
        return *_by_autograd((logits,), run), tokens * VOCABULARY

    def permute(elements: int, dtype: torch.dtype, device: Device) -> Any:
        x = leaf((max(elements // HIDDEN, 1), HIDDEN), dtype, device)
        order = torch.randperm(len(x), device=device.torch)
        return *_by_autograd((x,), lambda: x.index_select(0, order)), elements

    def accumulate(elements: int, dtype: torch.dtype, device: Device) -> Any:
        total = torch.zeros(elements, device=device.torch)
        part = torch.ones(elements, device=device.torch).to(dtype)
        return (lambda: None), (lambda _: total.add_(part)), elements

    def adamw(elements: int, dtype: torch.dtype, device: Device) -> Any:
        weight = torch.nn.Parameter(torch.randn(elements // HIDDEN, HIDDEN, device=device.torch))
        weight.grad = torch.randn_like(weight)
        rule = make_update_rule(OptimizerConfig(), [weight], [], device)
        copy = weight.detach().to(dtype)

        def update() -> None:
            assert weight.grad is not None
            torch.nn.utils.get_total_norm([weight.grad])
            weight.grad.mul_(1.0)
            rule.step()
            if copy.dtype != weight.dtype:
                copy.copy_(weight.detach())

        return update, (lambda _: None), elements

    def attention(elements: int, dtype: torch.dtype, device: Device) -> Any:
        length = int((2 * elements / HIDDEN) ** 0.5) * 4
        q, k, v = (leaf((1, HIDDEN // HEAD, length, HEAD), dtype, device) for _ in range(3))
        run = lambda: kernels["attention"](q, k, v, None)  # noqa: E731
        return *_by_autograd((q, k, v), run), HIDDEN * length * length // 2

    return {
        "norm": norm, "rotary": rotary, "gated": gated, "activation": activation, "add": add, "embedding": embedding,
        "cross_entropy": loss, "permute": permute, "accumulate": accumulate, "adamw": adamw, "attention": attention,
    }  # fmt: skip
