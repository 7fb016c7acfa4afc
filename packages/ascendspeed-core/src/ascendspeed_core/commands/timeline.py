"""`asd-core timeline`."""

import json
import sys
from dataclasses import asdict
from typing import Any

from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.timeline import TimelineConfig
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.errors import ConfigError


@options_from(TimelineConfig)
def timeline(**given: Any) -> None:
    """Run a few steps of a pipeline on random tokens, and draw what each device did when in the last one.

    Of a model whose experts are spread over ranks it counts and times the all-to-alls too; of one with replicas the
    reductions of gradients, and says how much of them the backward hides.

    Below the measured step the picture shows the same work with messages that take no time: what the schedule itself
    leaves idle.
    """
    config = load_config(TimelineConfig, None, {"train_iters": 1, **given})
    from ascendspeed_core.launch import is_worker, launch, planned_world_size, worker_errors

    world_size = planned_world_size(config.launch.nproc_per_node)
    with worker_errors():
        from ascendspeed_core.device import prepare_torch

        prepare_torch(config.launch.device)
        check_timeline(config, world_size)
        if config.recompute.note and not is_worker():
            log(config.recompute.note)
        if world_size > 1 and not is_worker():
            launch("ascendspeed_core.cli", sys.argv[1:], config.launch.nproc_per_node, config.launch.device)
            return
        record_timeline(config)


def check_timeline(config: TimelineConfig, world_size: int) -> None:
    """Raise `AscendSpeedError` when there is nothing to draw, or the layout does not fit."""
    from ascendspeed_core.config.layout import stages_of_ranks
    from ascendspeed_core.weights import open_source

    layout = config.parallel.layout(world_size)
    if layout.pp == 1 and layout.ep == 1 and layout.replicas == 1:
        raise ConfigError(
            "a timeline shows a pipeline, what experts exchange, or how gradients are added up; give "
            "--pipeline-model-parallel-size 2 or more, --expert-model-parallel-size, or more processes"
        )
    model = open_source(config.source, config.training.seed).config
    config.parallel.check_model(model)
    config.parallel.check_sequence(config.drawing.seq_length)
    held = stages_of_ranks(model.num_layers, layout)
    config.recompute.check_pipeline(
        layout.schedule, [sum(len(stage.layers) for stage in own) for own in held]
    )
    if config.recompute.is_fitted:
        raise ConfigError(
            "checkpoint_policy=auto is chosen by a training run, whose log names the layers; write it as "
            "--checkpoint-policy custom --recomputation-layer-num, or leave it out"
        )
    try:
        size = config.batch.resolve_global_batch_size(layout.dp)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    layout.check_micro_batches(len(micro_batch_sizes(config, size, layout.dp)))


def micro_batch_sizes(config: TimelineConfig, global_batch_size: int, dp: int) -> tuple[int, ...]:
    """Return the sizes of one rank's micro-batches."""
    size = config.batch.micro_batch_size
    return config.batch.manual_sizes() or (size,) * (global_batch_size // (size * dp))


def load_pipeline(config: TimelineConfig, mesh: Any) -> Any:
    """Return this rank's stages, computed as the options say."""
    import torch

    from ascendspeed_core.build import apply_kernels, kernel_context, load_model
    from ascendspeed_core.parallel.recompute import apply_recompute
    from ascendspeed_core.weights import open_source

    source = open_source(config.source, config.training.seed)
    dtype = getattr(torch, config.precision.dtype_name)
    model = load_model(source, mesh, dtype, config.compute.mlp_layer_fusion)
    setting = kernel_context(model, mesh, config.drawing.seq_length, config.batch)
    apply_kernels(model, config.compute, setting)
    apply_recompute(model, config.recompute, mesh.pp_rank)
    return model


def record_timeline(config: TimelineConfig) -> None:
    """Run the steps on this rank with the others; the first one draws its pipeline."""
    from ascendspeed_core.config.optimizer import OptimizerConfig
    from ascendspeed_core.launch import process_group
    from ascendspeed_core.observability.timeline import draw_timelines
    from ascendspeed_core.optim.native_engine import NativeEngine
    from ascendspeed_core.parallel.mesh import ParallelMesh, gather_objects
    from ascendspeed_core.parallel.timeline import Timeline, describe_reductions, ideal
    from ascendspeed_core.planner.profile_pipeline import choose_sizes, record_step

    with process_group(config.launch.device) as (world, device):
        layout = config.parallel.layout(world.size)
        mesh = ParallelMesh.create(device, layout)
        model = load_pipeline(config, mesh)
        engine = NativeEngine(model, OptimizerConfig(), mesh)
        size = config.batch.resolve_global_batch_size(layout.dp)
        sizes = micro_batch_sizes(config, size, layout.dp)
        if config.batch.finds_sizes:
            length, largest = config.drawing.seq_length, config.batch.micro_batch_size
            sizes, _ = choose_sizes(model, mesh, length, size // layout.dp, largest, engine)
        recorded = record_step(model, mesh, sizes, config.drawing.seq_length, engine)
        mine = mesh.tp_rank, mesh.replica, recorded.seconds_alone, *recorded.noted
        everything = gather_objects(mine, mesh)
        if world.rank:
            return
        first = [noted for tp, replica, _, *noted in everything if tp == replica == 0]
        alone = [seconds for tp, replica, seconds, *_ in everything if tp == replica == 0]
        measured = Timeline(*zip(*first, strict=True))
        planned = ideal(measured)
        picture = config.drawing.picture
        draw_timelines([(f"{layout}, measured", measured), ("messages that take no time", planned)], picture)
        numbers = {
            "layout": str(layout),
            "micro_batch_sizes": sizes,
            "measured": {"seconds": measured.makespan, "bubble": measured.bubble},
            "ideal": {"seconds": planned.makespan, "bubble": planned.bubble},
            "actions": [[asdict(action) for action in own] for own in measured.devices],
            "reductions": [[asdict(one) for one in own] for own in measured.reductions],
            "reduction_seconds_alone": alone,
            "exchanges": [[asdict(one) for one in own] for own in measured.exchanges],
        }
        picture.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
        log(
            f"{picture}: step {measured.makespan * 1000:.0f} ms, bubble {measured.bubble:.1%}; with messages that take "
            f"no time {planned.makespan * 1000:.0f} ms, bubble {planned.bubble:.1%}"
        )
        for number, (sums, seconds) in enumerate(zip(measured.reductions, alone, strict=True)):
            if sums:
                log(f"device {number}: {describe_reductions(sums, seconds)}")
        for number, own in enumerate(measured.exchanges):
            if own:
                log(
                    f"device {number}: {len(own)} all-to-alls of experts, {sum(one.sent_bytes for one in own):,} bytes "
                    f"sent, {sum(one.seconds for one in own) * 1000:.0f} ms with the wait for other ranks, "
                    f"{sum(one.seconds for one in own) / measured.makespan:.1%} of the step"
                )
