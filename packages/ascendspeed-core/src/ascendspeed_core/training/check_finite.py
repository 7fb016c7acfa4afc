"""End a run whose loss or gradient is no longer finite, and say where that began."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

from ascendspeed_core.data.micro_batch import MicroBatch, count_tokens
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


def check_evaluation(
    what: str,
    iteration: int,
    values: Mapping[str, float],
    micro_batches: Sequence[MicroBatch],
    mesh: ParallelMesh,
    measure: Callable[[Sequence[MicroBatch]], Mapping[str, float]],
) -> None:
    """Check what was measured on held-out data; all ranks call together, and measure again where it is not finite.

    Args:
        what: `validation` or `test`.
        iteration: of the weights.
        values: `loss` and others; a loss over no token is NaN and no error.
        micro_batches: of this rank.
        mesh: of this rank.
        measure: gives the values of some micro-batches.

    Raises:
        AscendSpeedError: the loss is not finite.
    """
    if isfinite(values["loss"]) or count_tokens(micro_batches, mesh) == 0:
        return
    where = "all micro-batches together"
    for number, one in enumerate(micro_batches, 1):
        if count_tokens([one], mesh) and not isfinite(measure([one])["loss"]):
            where = f"micro-batch {number} of {len(micro_batches)}"
            break
    raise AscendSpeedError(
        f"iteration {iteration}: the {what} loss is {values['loss']}, first in {where}; look at that data, or go on "
        "from the last checkpoint with a lower --lr"
    )
