"""Which kernel updates weights by AdamW."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ascendspeed_core.device import Device
from ascendspeed_core.kernels.npu import NpuAdamW

Groups = Iterable[dict[str, Any]]


@dataclass(frozen=True)
class AdamWImplementation:
    """One way to compute AdamW.

    Attributes:
        name: as the table of kernels shows it.
        reason: why it was taken.
        make: parameter groups, learning rate, betas and epsilon -> optimizer.
    """

    name: str
    reason: str
    make: Callable[[Groups, float, tuple[float, float], float], torch.optim.Optimizer]


def adamw_implementation(optimizer: str, device: Device, dtype: torch.dtype) -> AdamWImplementation:
    """Return what computes `--optimizer adam` or `fused_adam`.

    Args:
        optimizer: which of the two.
        device: where the weights are.
        dtype: of the master weights.
    """
    if optimizer == "adam" and device.kind == "npu":
        if dtype == torch.float32:
            return AdamWImplementation("npu", "adam: npu_apply_adam_w, tensor by tensor in place", NpuAdamW)
        reason = f"adam: torch's, tensor by tensor; npu_apply_adam_w takes float32, not {_name(dtype)}"
        return AdamWImplementation("reference", reason, _plain)
    return AdamWImplementation(
        "fused", f"{optimizer}: torch's kernel, all tensors in one call in place", _fused
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fused(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr, betas, eps, fused=True)


def _plain(groups: Groups, lr: float, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr, betas, eps, foreach=False)
