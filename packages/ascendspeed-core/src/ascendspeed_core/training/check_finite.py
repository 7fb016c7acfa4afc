"""End a run whose loss or gradient is no longer finite, and say where that began."""

from collections.abc import Sequence
from math import isfinite

from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.objectives.objective import ObjectiveLoss
from ascendspeed_core.observability.nan_detector import find_not_finite
from ascendspeed_core.optim.engine import Engine
from ascendspeed_core.optim.loss_scale import LossScale
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.step import StepResult, forward_backward
from ascendspeed_data.errors import AscendSpeedError


def check_finite(
    result: StepResult,
    iteration: int,
    model: Transformer,
    engine: Engine,
    micro_batches: Sequence[MicroBatch],
    mesh: ParallelMesh,
    loss_scale: LossScale | None,
    objective: ObjectiveLoss,
) -> None:
    """Check what a step gave; all ranks call together, and compute the step again where it was not finite.

    Args:
        result: of the step.
        iteration: its number.
        model: this rank's part.
        engine: of the model.
        micro_batches: of the step.
        mesh: of this rank.
        loss_scale: of fp16 training.
        objective: the loss.

    Raises:
        AscendSpeedError: the weights would be spoilt, or no smaller loss scale is left to try.
    """

    def where(scale: float = 1.0) -> str:
        def again() -> None:
            count, loss_of = objective.prepare(micro_batches, result.tokens)
            forward_backward(model, engine, micro_batches, mesh, count, loss_of, scale)

        return find_not_finite(model, mesh, again)

    if result.is_empty:
        return
    if result.is_skipped:
        if loss_scale and loss_scale.is_exhausted:
            raise AscendSpeedError(
                f"iteration {iteration}: fp16 overflows at loss_scale={loss_scale.scale}, and it may not "
                f"fall further; {where(loss_scale.scale)}; use --bf16, or go on from the last checkpoint "
                "with a lower --lr or other data"
            )
        return
    assert result.grad_norm is not None
    if not (isfinite(result.loss) and isfinite(result.grad_norm)):
        raise AscendSpeedError(
            f"iteration {iteration}: loss={result.loss}, grad_norm={result.grad_norm}; {where()}; "
            "go on from the last checkpoint with a lower --lr or other data"
        )
