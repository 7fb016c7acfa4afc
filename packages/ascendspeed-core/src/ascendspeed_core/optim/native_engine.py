"""The native engine: a plain forward and backward pass, and a `MasterOptimizer` that reduces and applies gradients."""

from collections.abc import Mapping, Sequence

import torch

from ascendspeed_core.config.layout import Stage
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.sharding import Slice
from ascendspeed_core.models.transformer import ModelInput, ModelOutput, Transformer
from ascendspeed_core.optim.engine import EngineMemory, ShareOfLoss, TensorShard
from ascendspeed_core.optim.optimizer import MasterOptimizer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.timeline import Reduction


class NativeEngine:
    """Trains one model on this rank; see `optim.engine.Engine`.

    Args:
        model: this rank's part.
        config: of the optimizer.
        mesh: of this rank.
        slices: which part of each parameter this rank holds, where it is not what `config.sharding` says.

    Attributes:
        optimizer: holds master weights and optimizer state.
    """

    def __init__(
        self,
        model: Transformer,
        config: OptimizerConfig,
        mesh: ParallelMesh,
        slices: Mapping[str, Slice] | None = None,
    ) -> None:
        self._model = model
        self.optimizer = MasterOptimizer(model, config, mesh, slices)

    @property
    def rule(self) -> torch.optim.Optimizer:
        """How a gradient changes a weight; its parameters are the master weights."""
        return self.optimizer.rule

    @property
    def num_steps(self) -> int:
        """Updates so far."""
        return self.optimizer.num_steps

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return self.optimizer.learning_rate

    @property
    def memory(self) -> EngineMemory:
        """What optimizer state and updates take."""
        optimizer = self.optimizer
        return EngineMemory(optimizer.state_bytes, optimizer.update_bytes, optimizer.gathered_bytes)

    def forward_backward(
        self, inputs: Sequence[ModelInput], share: ShareOfLoss, scale: float, auxiliary_scale: float
    ) -> None:
        """Leave the order of micro-batches to the trainer."""
        return

    def forward(self, given: ModelInput) -> ModelOutput:
        """Run a model without a pipeline."""
        output: ModelOutput = self._model(given)
        return output

    def backward(self, loss: torch.Tensor, scale: float, is_last: bool) -> None:
        """Add the gradient of a micro-batch to the parameters; in the last backward their reduction starts."""
        if is_last:
            self.begin_last_backward(*self._model.stages)
        (loss * scale).backward()

    def begin_last_backward(self, *stages: Stage) -> None:
        """Let gradients of some stages be reduced as the backward that begins completes them."""
        self.optimizer.reduction.begin_last_backward(stages)

    def end_last_backward(self, *stages: Stage) -> None:
        """Start to reduce what that backward left; `step` waits for it."""
        self.optimizer.reduction.end_last_backward()

    def wait_for_reductions(self) -> tuple[list[Reduction], float]:
        """Add up all gradients over the replicas and wait for them, without an update."""
        self.optimizer.finish_reductions()
        return self.optimizer.reduction.noted, self.optimizer.reduction.seconds_alone()

    def wait_for_parameters(self) -> None:
        """Wait until all parameters are those of the last update."""
        self.optimizer.reduction.wait_for_parameters()

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        self.optimizer.zero_grad()

    def step(self, loss_scale: float | None = None) -> float | None:
        """Reduce the gradients, clip them and update; see `MasterOptimizer.step`."""
        return self.optimizer.step(loss_scale)

    def checkpoint_shards(self) -> list[TensorShard]:
        """Return this rank's share of what a checkpoint holds."""
        return self.optimizer.checkpoint_shards()

    def state_slices(self) -> dict[str, tuple[Slice, ...]]:
        """Return which parts of the optimizer state `load_state` wants."""
        return self.optimizer.state_slices()

    def load_state(self, parts: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Take over an optimizer state; absent master weights are the model's."""
        self.optimizer.load_state(parts, num_steps)
