"""`asd-core pretrain`."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendspeed_core.config.load import NamedRecipe, load_config
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.device import HOST
from ascendspeed_core.launch import announce
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.command_line.stopping import keeping

if TYPE_CHECKING:
    from ascendspeed_core.config.model import ModelConfig
    from ascendspeed_core.parallel.mesh import ParallelMesh
    from ascendspeed_core.training.validate import RunPlan
    from ascendspeed_core.weights.adapters.lora import AdaptedWeights


RecipeName = Annotated[
    str | None,
    typer.Argument(
        metavar="[RECIPE]",
        help="Name of a recipe, or a TOML file; flags and --config win over it. `asd-core recipes` lists them.",
    ),
]
Recipe = Annotated[Path | None, typer.Option(help="TOML recipe with the sections below; flags win over it.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check files and options, print the plan, stop: on any machine.")
]
PreflightOnly = Annotated[
    bool,
    typer.Option(
        "--preflight-only",
        help="Check what --dry-run does, and this machine too: its devices and their memory; stop.",
    ),
]


@options_from(PretrainConfig)
def pretrain(
    recipe: RecipeName = None,
    config: Recipe = None,
    dry_run: DryRun = False,
    preflight_only: PreflightOnly = False,
    **given: Any,
) -> None:
    """Train a model on tokenized text, from random weights (--model-config) or from a checkpoint (--load).

    RECIPE gives all of a published model but data, checkpoint and folder: its size, layout and hyper-parameters.
    Give --nproc-per-node N to use N devices of this machine, or start the command under torchrun. Results in --save:
    checkpoints that any layout can load, metrics.jsonl and loss.png.
    """
    named = named_recipe(recipe, "pretrain")
    run_training(load_config(PretrainConfig, config, given, announce, named), dry_run, preflight_only)


def named_recipe(name: str | None, command: str) -> NamedRecipe | None:
    """Return the recipe of a command line, if it names one."""
    return None if name is None else NamedRecipe(name, command)


def run_training(config: PretrainConfig, dry_run: bool, preflight_only: bool = False) -> None:
    """Plan a run, say what it will do, and do it: in processes that this one starts, or as one of them."""
    from ascendspeed_core.launch import is_worker, launch, planned_world_size, worker_errors

    world_size = planned_world_size(config.launch.nproc_per_node)

    def kept() -> str:
        from ascendspeed_core.training.checkpoint import what_is_kept

        return what_is_kept(config.checkpoint.save)

    with worker_errors(), keeping(kept):
        from ascendspeed_core.device import prepare_torch

        prepare_torch(config.launch.device)
        from ascendspeed_core.training.validate import plan_run

        plan = plan_run(config, world_size)
        if not is_worker() or dry_run:
            describe(plan)
        if dry_run:
            return
        if preflight_only or not is_worker():
            check_machine(plan, preflight_only)
        if preflight_only:
            return
        if world_size > 1 and not is_worker():
            launch(
                "ascendspeed_core.cli", sys.argv[1:], config.launch.nproc_per_node, config.launch.device, kept
            )
            return
        from ascendspeed_core.training.trainer import Trainer

        with join_run(plan) as mesh:
            records = Trainer(plan, mesh).train()
        if records:
            conclude(records, plan)


def check_machine(plan: "RunPlan", says: bool) -> None:
    """Check the devices of this machine and their memory, before processes start.

    Args:
        plan: of the run.
        says: say what was found too.
    """
    from ascendspeed_core.device import check_device_count, choose_device
    from ascendspeed_core.launch import is_worker
    from ascendspeed_core.training.preflight import (
        Problems,
        check_memory,
        checkpoint_bytes,
    )

    config, layout = plan.config, plan.layout
    problems = Problems()
    processes = 1 if is_worker() else layout.world_size
    kind = problems.value(check_device_count, config.launch.device, processes)
    # A process that starts others leaves the accelerators to them.
    need = None
    if kind is not None and (says or layout.world_size == 1 or kind == HOST.kind):
        device = choose_device(kind, quiet=True)
        need = problems.value(check_memory, config, plan.source, layout, device, trusts_plan=says)
    problems.raise_found()
    if says:
        size = checkpoint_bytes(config, plan.source) / 1e9
        log(f"preflight: nothing is wrong; {need}; a checkpoint takes {size:.2f} GB")


@contextmanager
def join_run(plan: "RunPlan") -> "Iterator[ParallelMesh]":
    """Join the other ranks of a run, if there are any; the first one holds the lock of the run's folder."""
    from ascendspeed_core.launch import process_group
    from ascendspeed_core.parallel.mesh import ParallelMesh
    from ascendspeed_core.training.preflight import check_memory
    from ascendspeed_data.lock import output_lock

    save = plan.config.checkpoint.save
    # The watchdog says more than a collective that gives up; where both watch, it comes first.
    patience = 600.0 + plan.config.monitor.hang_timeout_seconds
    alone = plan.config.parallel.chosen_engine != "ascendspeed"
    joined = process_group(plan.config.launch.device, patience, even_alone=alone)
    with joined as (world, device), ExitStack() as held:
        if save is not None and world.rank == 0:
            held.enter_context(output_lock(save / "run.lock", f"--save {save}"))
            keep_tokenizer(plan, save)
        if device.memory_bytes() is not None:
            check_memory(plan.config, plan.source, plan.layout, device)
        yield ParallelMesh.create(device, plan.layout)


def keep_tokenizer(plan: "RunPlan", save: Path) -> None:
    """Copy the tokenizer's files into the run's folder, so that its checkpoints can be used on their own.

    The manifest of the data goes there too: it says which tokenizer is right where the files are not known.
    """
    from ascendspeed_core.weights.native.source import TOKENIZER
    from ascendspeed_core.weights.source import DATA_MANIFEST
    from ascendspeed_data.files import write_durably
    from ascendspeed_data.tokenizer import copy_tokenizer

    folder = plan.config.data.tokenizer_name_or_path or plan.source.tokenizer
    if folder is not None:
        copy_tokenizer(folder, save / TOKENIZER)
    if plan.manifest is not None:
        write_durably(save / DATA_MANIFEST, plan.manifest.model_dump_json(indent=2) + "\n")


def describe(plan: "RunPlan") -> None:
    """Say what a run will do."""
    from ascendspeed_core.weights.adapters.lora import AdaptedWeights

    model, batch, recipe = plan.model, plan.config.batch, plan.config.recipe
    if recipe.name is not None:
        size, meant = plan.layout.world_size, recipe.devices
        other = "" if meant in (None, size) else f"; its layout is for {meant} devices, this run has {size}"
        log(f"recipe: {recipe.name}{other}")
    log(
        f"model: {model.family}, {model.num_parameters:,} parameters, {model.num_layers} layers, "
        f"hidden {model.hidden_size}, vocabulary {model.vocab_size}, weights: {plan.source.kind}"
    )
    size = batch.resolve_global_batch_size(plan.layout.dp)
    engine = plan.config.parallel.chosen_engine
    if engine != "ascendspeed":
        log(f"engine: {engine}")
    log(
        f"layout: {plan.layout}, {plan.config.precision.dtype_name}; batch: {size} samples of "
        f"{plan.config.data.seq_length} tokens; iterations {plan.state.iteration} to {plan.config.training.train_iters}"
    )
    if isinstance(plan.source, AdaptedWeights):
        log(trained_share(plan.source, model))
    if plan.config.compute.mlp_layer_fusion:
        joined = ["queries, keys and values"] + ["gate and up"] * model.is_gated
        log(f"one matrix product each for {'; '.join(joined)} (--mlp-layer-fusion)")
    if plan.config.recompute.note:
        log(plan.config.recompute.note)
    if plan.layout.pp > 1:
        log(f"stages: {stage_list(plan.layout, model.num_layers)}")
    for line in plan.objective.describe():
        log(line)


def trained_share(source: "AdaptedWeights", model: "ModelConfig") -> str:
    """Say how many of the parameters are trained."""
    from math import prod

    adapters = source.adapters
    infos = source.tensors()
    trained = sum(prod(info.shape) for name, info in infos.items() if adapters.is_trained(name))
    ranks = sorted({low_rank.rank for low_rank in adapters.layers.values()})
    whole = f", and {', '.join(sorted(adapters.trained))}" if adapters.trained else ""
    return (
        f"adapters: {len(adapters.layers)} layers of rank {', '.join(map(str, ranks))}{whole}; {trained:,} trained "
        f"parameters beside {model.num_parameters:,} of the model ({100 * trained / model.num_parameters:.2f} %)"
    )


def stage_list(layout: Any, num_layers: int) -> str:
    """Return which layers each pipeline rank holds; several stages of one rank are joined by a plus."""
    from ascendspeed_core.config.layout import stages_of_ranks

    def named(layers: range) -> str:
        return f"{layers.start}-{layers.stop - 1}" if len(layers) > 1 else str(layers.start)

    parts = ["+".join(named(stage.layers) for stage in held) for held in stages_of_ranks(num_layers, layout)]
    return "layers " + ", ".join(parts)


def conclude(records: list[dict[str, Any]], plan: "RunPlan") -> None:
    """Say where the loss ended, against what knowing only token frequencies would give."""
    last = [record["lm_loss"] for record in records if record["lm_loss"] is not None][-10:]
    if not last:
        return
    loss = sum(last) / len(last)
    entropy = plan.unigram_entropy_nats
    against = ""
    if entropy is not None:
        side = "below" if loss <= entropy else "above"
        against = (
            f", {abs(entropy - loss):.3f} nats {side} the unigram entropy of the data ({entropy:.3f} nats)"
        )
    log(f"loss: {loss:.4f} {plan.objective.loss_unit} (mean of the last {len(last)} iterations){against}")
