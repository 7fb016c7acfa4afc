"""Measure a run and choose for it what its options leave to `auto`: micro-batch sizes, and what is recomputed."""

from collections.abc import Sequence

from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.data.loader import BatchLoader
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.optim.engine import Engine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.planner.fit_memory import fit_recompute, full_step, memory_budget
from ascendspeed_core.planner.micro_batches import bubble_seconds
from ascendspeed_core.planner.profile_pipeline import choose_sizes


def plan_micro_batches(
    model: Transformer, engine: Engine, config: PretrainConfig, mesh: ParallelMesh
) -> tuple[tuple[int, ...], list[str]]:
    """Return the sizes of a rank's micro-batches, and lines for the log; all ranks call together.

    Args:
        model: this rank's stages.
        engine: of the model.
        config: of the run.
        mesh: of this rank.

    Returns:
        Sizes in order: those of `--manual-mbs`, or measured for `auto`; none where all are `--micro-batch-size`.
    """
    batch, layout = config.batch, mesh.layout
    if not batch.finds_sizes:
        return batch.manual_sizes(), []
    samples = batch.resolve_global_batch_size(layout.dp) // layout.dp
    sizes, cost = choose_sizes(model, mesh, config.data.seq_length, samples, batch.micro_batch_size, engine)
    even = (batch.micro_batch_size,) * (samples // batch.micro_batch_size)
    before, after = (bubble_seconds(own, layout.pp, cost) * 1000 for own in (even, sizes))
    line = (
        f"micro-batches: {','.join(map(str, sizes))}; planned idle time per step {after:.1f} ms, {before:.1f} ms "
        "with even ones; give them as --manual-mbs to use them again"
    )
    return sizes, [line]


def plan_recompute(
    model: Transformer,
    engine: Engine,
    config: PretrainConfig,
    mesh: ParallelMesh,
    data: BatchLoader,
    sizes: Sequence[int],
) -> list[str]:
    """Make layers drop as little as the memory budget allows, in place; all ranks call together.

    Args:
        model: this rank's stages.
        engine: of the model.
        config: of the run; does nothing unless its policy is `auto`.
        mesh: of this rank.
        data: of the run; a step like its samples is measured.
        sizes: of `plan_micro_batches`.

    Returns:
        Lines for the log.
    """
    recompute, batch = config.recompute, config.batch
    if not recompute.is_fitted:
        return []
    per_rank = batch.resolve_global_batch_size(mesh.layout.dp) // mesh.layout.dp
    sizes = sizes or (batch.micro_batch_size,) * (per_rank // batch.micro_batch_size)
    (sample,) = data.micro_batches(0, (max(sizes),))
    budget = memory_budget(recompute.memory_budget_gib, mesh.device)
    step = full_step(sample, sizes, config.data.seq_length, mesh)
    return fit_recompute(model, engine, mesh, step, budget)
