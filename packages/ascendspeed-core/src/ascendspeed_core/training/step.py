"""One training step.

Shapes: B micro-batch size, S sequence length (S/cp under context parallelism), V/tp this rank's part of the
vocabulary, L layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import nan

import torch

from ascendspeed_core.data.micro_batch import MicroBatch, count_tokens
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.objectives.next_token import NextTokenLoss
from ascendspeed_core.objectives.objective import MicroBatchLoss, ObjectiveLoss
from ascendspeed_core.optim.engine import Engine
from ascendspeed_core.optim.loss_scale import LossScale
from ascendspeed_core.parallel.auxiliary_losses import LossSums
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.router_steps import begin_router_step, end_router_step, update_router_biases


@dataclass(frozen=True)
class StepResult:
    """What a step reports.

    Attributes:
        loss: mean over the global batch: negative log-likelihood per token that counts, in nats, or as the objective
            says; not a number when no token counts.
        grad_norm: of the whole model's gradient, before clipping; `None` when the step was skipped.
        tokens: tokens that counted.
        auxiliary_losses: by name, divided by what `loss` is divided by and not in it; empty when the model has none.
        expert_loads: tokens that chose each expert of each layer, [L, E]; `None` when the model has none.
    """

    loss: float
    grad_norm: float | None
    tokens: int
    auxiliary_losses: dict[str, float] = field(default_factory=dict)
    expert_loads: torch.Tensor | None = None

    @property
    def is_skipped(self) -> bool:
        """Whether nothing was updated: fp16 overflowed, or no token counts."""
        return self.grad_norm is None

    @property
    def is_empty(self) -> bool:
        """Whether no token of the global batch counts."""
        return self.tokens == 0


def train_step(
    model: Transformer,
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    mesh: ParallelMesh,
    loss_scale: LossScale | None = None,
    objective: ObjectiveLoss | None = None,
) -> StepResult:
    """Accumulate the gradient of all micro-batches of all data-parallel ranks and parts of sequences, then update once.

    Every token of the global batch weighs the same, however the tokens fall into micro-batches and ranks: each
    loss is the sum over its tokens divided by the number of tokens of all; an objective may count something else. When
    no token counts, nothing is computed: an update by a gradient of zero would still move weights by decay and by the
    memory of earlier gradients.

    Args:
        model: this rank's part.
        engine: computes and applies its gradients.
        micro_batches: of this rank.
        mesh: of this rank.
        loss_scale: of fp16 training; learns from the step.
        objective: the loss; without one, next-token prediction.
    """
    objective = objective or NextTokenLoss(model, mesh)
    tokens = count_tokens(micro_batches, mesh)
    if tokens == 0:
        return StepResult(loss=nan, grad_norm=None, tokens=0)
    count, loss_of = objective.prepare(micro_batches, tokens)
    scale = loss_scale.scale if loss_scale else None
    share = forward_backward(model, engine, micro_batches, mesh, count, loss_of, scale or 1.0)
    loss = mesh.sum_over("replicas", share.loss)
    auxiliary = {name: float(mesh.sum_over("replicas", part)) for name, part in share.auxiliary.items()}
    # The loss is waited for last: what the step asks of the device meets no pause.
    grad_norm = engine.step(scale)
    if share.expert_loads is not None and grad_norm is not None:
        update_router_biases(model, share.expert_loads)
    result = StepResult(float(loss), grad_norm, tokens, auxiliary, share.expert_loads)
    if loss_scale:
        loss_scale.update(overflow=result.is_skipped)
    return result


def forward_backward(
    model: Transformer,
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    mesh: ParallelMesh,
    count: int,
    loss_of: MicroBatchLoss,
    scale: float = 1.0,
) -> LossSums:
    """Add the gradients of this rank's micro-batches to the parameters, and return their share of the losses.

    Experts' loads are those of all ranks already.

    Args:
        model: this rank's part.
        engine: computes its gradients.
        micro_batches: of this rank.
        mesh: of this rank.
        count: what the loss of the global batch is divided by, at least one; see `ObjectiveLoss.prepare`.
        loss_of: the sum of a micro-batch's losses.
        scale: factor of the gradients, see `LossScale`; the loss that is returned is without it.
    """

    def share(number: int, output: torch.Tensor) -> torch.Tensor:
        return loss_of(number, output) / count

    inputs = [micro_batch.input_for_loss for micro_batch in micro_batches]
    begin_router_step(model, mesh, inputs, count)
    by_engine = engine.forward_backward(
        [micro_batch.input for micro_batch in micro_batches], share, scale, scale / count
    )
    if by_engine is not None:
        sums = by_engine
    elif mesh.layout.pp > 1:
        # torch's schedules take seconds to import.
        from ascendspeed_core.parallel.pipeline import run_pipeline

        sums = run_pipeline(
            model,
            mesh,
            inputs,
            lambda number, output: share(number, output) * scale,
            on_last_backward=engine.begin_last_backward,
            on_stage_done=engine.end_last_backward,
            auxiliary_scale=scale / count,
        )
        sums.loss.div_(scale)
    else:
        sums = LossSums.zeros(model, mesh.device.torch)
        for number, given in enumerate(inputs):
            output, losses = engine.forward(given)
            loss = share(number, output)
            # Logits are the largest activation of all: they must not outlive their use.
            del output
            sums.loss.add_(loss.detach())
            sums.add(losses)
            for auxiliary in losses.values():
                loss = loss + auxiliary / count
            engine.backward(loss, scale, is_last=number == len(micro_batches) - 1)
    for auxiliary in sums.auxiliary.values():
        if mesh.layout.sequence_parallel:
            # Each tensor-parallel rank has the losses of its part of the sequence, or a share of the whole.
            mesh.sum_over("tp", auxiliary)
        auxiliary.div_(count)
    return replace(sums, expert_loads=end_router_step(model, mesh))
