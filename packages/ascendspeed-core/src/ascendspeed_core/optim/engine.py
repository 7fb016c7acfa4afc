"""What computes and applies gradients, as the trainer sees it: the native engine, DeepSpeed, or megatron-core."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ascendspeed_core.config.layout import Stage
from ascendspeed_core.config.sharding import Slice
from ascendspeed_core.models.transformer import ModelInput, ModelOutput
from ascendspeed_core.parallel.auxiliary_losses import LossSums
from ascendspeed_core.parallel.timeline import Reduction

ShareOfLoss = Callable[[int, torch.Tensor], torch.Tensor]
"""Number of a micro-batch and its logits, [B, S, V/tp] -> its share of the loss of the global batch."""


class TensorShard(NamedTuple):
    """What one rank holds of a tensor.

    Attributes:
        name: of the tensor in a checkpoint.
        slice: which part of it; `None` is all of it.
        values: that part.
    """

    name: str
    slice: Slice | None
    values: torch.Tensor


class EngineMemory(NamedTuple):
    """Bytes that an engine takes on one rank, beside the weights that the model computes with.

    Attributes:
        state_bytes: always: optimizer state and master weights.
        update_bytes: most of a reduction and update, the gradients included.
        gathered_bytes: of messages with new parameters that modules wait for one after the other.
    """

    state_bytes: int
    update_bytes: int
    gathered_bytes: int = 0


class UpdateRule(Protocol):
    """How gradients change weights, as a schedule sees it: the groups whose rates it sets."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Weights and numbers of each group, as in torch's optimizers."""


class Engine(Protocol):
    """Forward, backward and update of this rank's part of a model.

    The trainer runs micro-batches through `forward` and `backward`, or through its own pipeline; an engine that has
    schedules of its own runs a whole step in `forward_backward` instead.
    """

    @property
    def rule(self) -> UpdateRule:
        """How a gradient changes a weight; the schedule sets its rates."""

    @property
    def num_steps(self) -> int:
        """Updates so far."""

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""

    @property
    def memory(self) -> EngineMemory | None:
        """What the engine takes; `None` where that is not known."""

    def forward_backward(
        self, inputs: Sequence[ModelInput], share: ShareOfLoss, scale: float, auxiliary_scale: float
    ) -> LossSums | None:
        """Add the gradients of all micro-batches of a step, by a schedule of the engine's own.

        Args:
            inputs: of each micro-batch.
            share: its part of all losses of the global batch.
            scale: factor of the gradients; `step` gets it again.
            auxiliary_scale: factor of the gradients of auxiliary losses.

        Returns:
            This rank's share of the losses, auxiliary ones undivided, the same on all stages; `None` where the trainer
            runs the micro-batches.
        """

    def forward(self, given: ModelInput) -> ModelOutput:
        """Run the model; logits are [B, S, V/tp]. Their losses, and the auxiliary ones, are what `backward` takes."""

    def backward(self, loss: torch.Tensor, scale: float, is_last: bool) -> None:
        """Add the gradient of a micro-batch.

        Args:
            loss: its share of all losses of the global batch.
            scale: factor of the gradient; `step` gets it again.
            is_last: no further micro-batch belongs to this step.
        """

    def begin_last_backward(self, *stages: Stage) -> None:
        """Let gradients of pipeline stages be added up over the replicas as the backward that begins completes them."""

    def end_last_backward(self, *stages: Stage) -> None:
        """Start to add up what that backward left."""

    def wait_for_reductions(self) -> tuple[list[Reduction], float]:
        """Add up all gradients over the replicas and wait for them, without an update; `zero_grad` must follow.

        Returns:
            What was added up, and how many seconds that takes beside nothing else.
        """

    def wait_for_parameters(self) -> None:
        """Wait until all parameters are those of the last update; the forward of a module waits for its own."""

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""

    def step(self, loss_scale: float | None = None) -> float | None:
        """Update, and return the gradient's norm; `None` when it overflowed, so that nothing was updated."""

    def checkpoint_shards(self) -> list[TensorShard]:
        """Return what this rank writes of weights and optimizer state."""

    def state_slices(self) -> dict[str, tuple[Slice, ...]]:
        """Return which parts of the optimizer state `load_state` wants, by name."""

    def load_state(self, parts: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Take over an optimizer state; several parts of a name come concatenated and flat."""
