"""What the trainer asks of whatever computes and applies gradients: our own optimizer, or DeepSpeed."""

from collections.abc import Mapping
from typing import Protocol

import torch

from ascendspeed_core.config.parallel import Stage
from ascendspeed_core.config.sharding import Slice
from ascendspeed_core.models.transformer import ModelInput, ModelOutput

TensorShard = tuple[str, Slice | None, torch.Tensor]
"""A tensor's name in a checkpoint, which part of it, and its values."""


class Engine(Protocol):
    """Forward, backward and update of this process's part of a model."""

    @property
    def rule(self) -> torch.optim.Optimizer:
        """How a gradient changes a weight; the schedule sets its rates."""

    num_steps: int
    """Updates so far."""

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""

    def forward(self, given: ModelInput) -> ModelOutput:
        """Run the model; logits are [B, S, V/tp]. Their losses, and the auxiliary ones, are what `backward` takes."""

    def backward(self, loss: torch.Tensor, scale: float, is_last: bool) -> None:
        """Add the gradient of a micro-batch.

        Args:
            loss: its share of all losses of the global batch.
            scale: factor of the gradient, which `step` is told again.
            is_last: no further micro-batch belongs to this step.
        """

    def start_reduction(self, stage: Stage) -> None:
        """Start to add up the gradients of one stage of a pipeline, which are complete."""

    def step(self, loss_scale: float | None = None) -> float | None:
        """Update, and return the gradient's norm; `None` when it overflowed, so that nothing was updated."""

    def pieces(self) -> list[TensorShard]:
        """Return what this process writes of weights and optimizer state."""

    def state_slices(self) -> dict[str, tuple[Slice, ...]]:
        """Return which parts of the optimizer state `load_state` wants, by name."""

    def load_state(self, parts: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Take over an optimizer state; several parts of a name come one behind the other, flat."""
