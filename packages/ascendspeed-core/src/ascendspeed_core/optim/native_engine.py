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
        return EngineMemory(self.optimizer.state_bytes, self.optimizer.update_bytes)

    def forward_backward(self, inputs: Sequence[ModelInput], share: ShareOfLoss, scale: float) -> None:
        """Leave the order of micro-batches to the trainer."""
        return

    def forward(self, given: ModelInput) -> ModelOutput:
        """Run a model without a pipeline."""
        output: ModelOutput = self._model(given)
        return output

    def backward(self, loss: torch.Tensor, scale: float, is_last: bool) -> None:
        """Add the gradient of a micro-batch to the parameters; `step` reduces it."""
        (loss * scale).backward()

    def start_reduction(self, stage: Stage) -> None:
        """Start to add up the gradients of one pipeline stage, which are complete; `step` waits for them."""
        self.optimizer.start_reduction(stage)

    def wait_for_reductions(self) -> None:
        """Add up all gradients over the replicas and wait for them, without an update."""
        self.optimizer.finish_reductions()

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
