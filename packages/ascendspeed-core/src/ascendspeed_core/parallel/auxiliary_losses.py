"""Auxiliary losses under parallel layouts; see `models.auxiliary_losses` for what they are.

- **Pipelines.** Only hidden states travel between stages, so the losses of a stage are attached to what it computes:
  its values stay as they are, and its backward starts the backward of the losses too. (As `MoEAuxLossAutoScaler` of
  Megatron-LM, with the factor given instead of kept for the whole process.) No message is added, and schedules that
  compute the gradients of inputs and weights apart see one more operator.
- **Tensor parallelism.** Attention and MLP read the same tokens on every rank of the group, so each rank computes the
  whole loss, and the gradients of what they read are added up over the group. Each rank therefore takes its share.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ascendspeed_core.models.auxiliary_losses import AuxiliaryLosses
from ascendspeed_core.models.transformer import Transformer


def attach_losses(x: torch.Tensor, losses: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
    """Return `x`; its backward adds the gradient of the losses, times `scale`."""
    if not losses:
        return x
    attached: torch.Tensor = _AttachLoss.apply(x, torch.stack(list(losses.values())).sum(), scale)
    return attached


def share_losses(losses: AuxiliaryLosses, tp: int, is_sequence_cut: bool) -> AuxiliaryLosses:
    """Return what one of `tp` ranks, which all computed the same losses, takes of them.

    Args:
        losses: whole, the same on every rank.
        tp: ranks of the group.
        is_sequence_cut: with sequence parallelism values are shares too, as of all that stands between cut modules;
            without it every rank reports the whole loss.
    """
    if is_sequence_cut:
        return {name: loss / tp for name, loss in losses.items()}
    return {name: _ScaleGradient.apply(loss, 1 / tp) for name, loss in losses.items()}


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.gradient = torch.full_like(loss, scale)
        # A copy: torch's schedules detach what a stage returns in place, which a view refuses.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return gradients[0], ctx.gradient, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.factor, None


@dataclass(frozen=True)
class LossSums:
    """Losses added up over micro-batches, float64.

    Attributes:
        loss: the main one.
        auxiliary: the others by name, of which every rank has the same; empty when the model has none.
        expert_loads: tokens that chose each expert, see `parallel.router_steps`.
    """

    loss: torch.Tensor
    auxiliary: dict[str, torch.Tensor]
    expert_loads: torch.Tensor | None = None

    @classmethod
    def zeros(cls, model: Transformer, device: torch.device) -> "LossSums":
        """Return sums of nothing."""
        names = ("", *model.auxiliary_loss_names)
        loss, *others = torch.zeros(len(names), dtype=torch.float64, device=device).unbind()
        return cls(loss, dict(zip(names[1:], others, strict=True)))

    def add(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Add auxiliary losses, in place."""
        for name, loss in losses.items():
            self.auxiliary[name] += loss.detach()
