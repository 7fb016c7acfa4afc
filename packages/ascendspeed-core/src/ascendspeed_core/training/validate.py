"""Plan a run: check everything that can be wrong before a process group or a model exists."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ascendspeed_core.config.layout import Layout, stages_of_ranks
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.migrate import migrate_config
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.launch import announce
from ascendspeed_core.objectives.objective import Objective
from ascendspeed_core.objectives.registry import objective_of
from ascendspeed_core.observability.monitor import check_monitor
from ascendspeed_core.optim.build_engine import check_engine, megatron_fields
from ascendspeed_core.optim.schedule import with_iterations
from ascendspeed_core.training.changes import changed_options
from ascendspeed_core.training.checkpoint import (
    TrainState,
    check_optimizer,
    load_train_state,
    saved_iterations,
)
from ascendspeed_core.training.data_order import as_it_began, check_data_order, data_order
from ascendspeed_core.training.eval_prompts import EvalPromptsPlan, plan_eval_prompts
from ascendspeed_core.training.preflight import Problems, check_space
from ascendspeed_core.training.run_length import num_samples, with_all_epochs, with_all_held_out
from ascendspeed_core.weights import NativeSource, WeightSource, open_source, open_weights
from ascendspeed_core.weights.adapters.ascendspeed import open_adapter
from ascendspeed_core.weights.adapters.lora import (
    AdaptedWeights,
    drawn_adapters,
    frozen_changes,
    loaded_adapters,
    plan_adapters,
    resumed_adapters,
)
from ascendspeed_core.weights.fingerprint import fingerprint
from ascendspeed_core.weights.huggingface.config import dropout_of
from ascendspeed_core.weights.native.source import DESCRIPTION, TRACKER
from ascendspeed_core.weights.source import stored_source
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.manifest import DatasetManifest

BASE_KEY = "base_fingerprint"
"""Key in the `run` of a checkpoint's description: which weights its adapters were trained beside."""


@dataclass(frozen=True)
class RunPlan:
    """What a run will do, checked.

    Attributes:
        config: as given, with the number of iterations that `train_samples` or `num_train_epochs` makes.
        layout: ranks along each dimension.
        source: where the weights come from.
        state: where the run stands at its first step.
        checkpoint: what holds that position, optimizer and random state; `None` when the run starts anew.
        num_samples: samples of the whole run for training, validation and test.
        manifest: of the training data, if it has one.
        objective: what it trains for: data, loss, metrics.
        eval_prompts: prompts that are completed while training.
    """

    config: PretrainConfig
    layout: Layout
    source: WeightSource
    state: TrainState
    checkpoint: NativeSource | None
    num_samples: tuple[int, int, int]
    manifest: DatasetManifest | None
    objective: Objective
    eval_prompts: EvalPromptsPlan | None = None

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.source.config

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint with its iteration, optimizer and data position."""
        return self.checkpoint is not None and self.state.iteration > 0

    def checkpoint_record(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the run beside its config, read anew from the files."""
        record = self.objective.checkpoint_record()
        if self.config.parallel.megatron_args is not None:
            record["megatron_fields"] = megatron_fields(self.config)
        if isinstance(self.source, AdaptedWeights):
            record[BASE_KEY] = fingerprint(self.source.untouched)
        return record

    @property
    def unigram_entropy_nats(self) -> float | None:
        """Loss of knowing only token frequencies; unknown where only some tokens are learned."""
        if self.manifest is None or self.manifest.kind != "text":
            return None
        return self.manifest.unigram_entropy_nats


def plan_run(config: PretrainConfig, world_size: int) -> RunPlan:
    """Check a run from its config, the headers of its checkpoint and its data, and name all that is wrong.

    Raises:
        ConfigError: options that contradict each other or the number of processes; or several problems.
        AscendSpeedError: a file that is missing, damaged, or does not fit.
    """
    problems = Problems()
    layout = problems.value(_layout, config, world_size)
    problems.value(config.optimizer.check_unit, in_samples=config.training.train_samples is not None)
    problems.value(check_monitor, config, world_size)
    problems.value(config.parallel.check_sequence, config.data.seq_length)
    if layout is not None:
        training = with_iterations(config.training, config.batch, layout.dp)
        config = config.model_copy(update={"training": training})
    opened = problems.value(_open_source, config)
    if opened is not None:
        _check_source(config, layout, opened[0], problems)
    _say_what_scales_nothing(config)
    kind = objective_of(config)
    read = problems.value(_read_data, config, kind, layout) if layout is not None else None
    if opened is not None and read is not None:
        problems.value(_check_vocabulary, config, opened[0], read[2])
    started = None
    if opened is not None and read is not None:
        started = problems.value(_start, read[0], kind, *opened)
    problems.raise_found()
    assert layout is not None
    assert opened is not None
    assert read is not None
    assert started is not None
    (source, checkpoint), (_, samples, manifest), (config, state) = opened, read, started
    objective = kind.plan(config, source, checkpoint if state.iteration > 0 else None)
    tokenizer = config.data.tokenizer_name_or_path or source.tokenizer
    prompts = plan_eval_prompts(config.eval_prompts, source.config, layout, tokenizer)
    return RunPlan(config, layout, source, state, checkpoint, samples, manifest, objective, prompts)


def _layout(config: PretrainConfig, world_size: int) -> Layout:
    layout = config.parallel.layout(world_size)
    try:
        config.batch.resolve_global_batch_size(layout.dp)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return layout


def _check_source(
    config: PretrainConfig, layout: Layout | None, source: WeightSource, problems: Problems
) -> None:
    """Check the options against the model."""
    where = str(source.path or config.start.model_config_file)
    problems.value(config.model.check, source.config, where)
    problems.value(_check_dropout, config, source)
    problems.value(config.parallel.check_model, source.config)
    problems.value(_check_experts, config, source)
    if layout is not None:
        problems.value(_check_pipeline, config, layout, source.config)
        problems.value(check_engine, config, layout, source.config)
    problems.value(_check_length, config, source.config, where)
    problems.value(check_space, config, source)


def _read_data(
    config: PretrainConfig, kind: type[Objective], layout: Layout
) -> tuple[PretrainConfig, tuple[int, int, int], DatasetManifest | None]:
    """Return the config with the length that the data decides, the samples of the run, and the data's manifest."""
    config = with_all_epochs(config, kind, layout.dp)
    config = with_all_held_out(config, kind, layout.dp)
    samples = num_samples(config, layout.dp)
    return config, samples, kind.check_data(config.data, samples)


def _start(
    config: PretrainConfig, kind: type[Objective], source: WeightSource, checkpoint: NativeSource | None
) -> tuple[PretrainConfig, TrainState]:
    """Return where the run stands at its first step, and its config with the data as the run began with it."""
    state = _initial_state(config, checkpoint, data_order(config, kind.data_order))
    if checkpoint is not None and state.iteration > 0:
        began = load_train_state(checkpoint).data_order
        data, order = as_it_began(began, config.data, state.data_order)
        config, state = config.model_copy(update={"data": data}), replace(state, data_order=order)
        _check_base(source, checkpoint)
        run, _ = migrate_config(checkpoint.description.get("run", {}), str(checkpoint.folder))
        for line in changed_options(run, config):
            announce(line)
    _check_save_folder(config, checkpoint, state)
    return config, state


def _check_experts(config: PretrainConfig, source: WeightSource) -> None:
    """Check that options of routers mean something, and that no adapter asks for what experts cannot do."""
    given, experts = sorted(config.experts.model_fields_set), source.config.experts
    where = source.path or config.start.model_config_file
    if given and experts is None:
        raise ConfigError(f"{given[0]} was given for {where}, a model without experts; leave it out")
    if config.experts.moe_router_bias_update_rate and experts is not None and not experts.score_bias:
        raise ConfigError(
            f"moe_router_bias_update_rate={config.experts.moe_router_bias_update_rate}: the routers of {where} have "
            "no bias; balance their load by --moe-aux-loss-coeff"
        )
    if source.adapters is None:
        return
    if config.experts.moe_router_bias_update_rate:
        raise ConfigError(
            "moe_router_bias_update_rate changes biases of the base, which an adapter does not hold; leave it out"
        )
    for name, low_rank in source.adapters.layers.items():
        if ".experts." in name and low_rank.dropout:
            raise ConfigError(
                f"lora_dropout={low_rank.dropout} drops by the token's position, which {name} does not know; choose 0, "
                "or leave experts out of --lora-target-modules"
            )


def _say_what_scales_nothing(config: PretrainConfig) -> None:
    """Say so where options of loss scaling were given for another precision than fp16."""
    given = sorted(config.loss_scaling.model_fields_set)
    if given and config.precision.dtype_name != "float16":
        announce(
            f"{', '.join(given)} scales nothing in {config.precision.dtype_name}: only fp16 needs a loss scale"
        )


def _open_source(config: PretrainConfig) -> tuple[WeightSource, NativeSource | None]:
    """Return the weights, and the native checkpoint that they or their adapters come from."""
    start, save = config.start, config.checkpoint.save
    found = save if start.auto_resume and save and (save / TRACKER).is_file() else None
    if start.auto_resume and found is None:
        announce(f"auto_resume: {save} holds no checkpoint; this is a new run")
    if config.adapters is not None:
        return _open_adapted(config, config.adapters, found)
    source = open_weights(found) if found else open_source(start, config.training.seed, config.recipe.model)
    return source, source if isinstance(source, NativeSource) else None


def _open_adapted(
    config: PretrainConfig, lora: LoraConfig, found: Path | None
) -> tuple[AdaptedWeights, NativeSource | None]:
    """Return the base with its adapters: those of the run that goes on, those that are loaded, or new ones."""
    source, checkpoint = _find_adapted(config, lora, found)
    head = source.adapters.layers.get("output_head")
    if head is not None and head.dropout:
        raise AscendSpeedError(
            f"lora_dropout={head.dropout}: nothing is dropped before the adapter of the head; leave one of them out"
        )
    return source, checkpoint


def _find_adapted(
    config: PretrainConfig, lora: LoraConfig, found: Path | None
) -> tuple[AdaptedWeights, NativeSource | None]:
    base = open_source(config.start, config.training.seed, config.recipe.model)
    load = found or lora.lora_load
    if load is not None and ((load / TRACKER).is_file() or (load / DESCRIPTION).is_file()):
        checkpoint = NativeSource(load, is_adapter=True)
        source = resumed_adapters(base, checkpoint)
        if lora.lora_target_modules and source.adapters != plan_adapters(lora, source.config, str(base.path)):
            raise AscendSpeedError(
                f"{checkpoint.folder} has adapters of other layers, ranks or scales than the options ask for; give the "
                "same --lora-* options, or --lora-load alone"
            )
        return source, checkpoint
    if load is not None:
        adapter = open_adapter(load, base.config, base.path)
        adapter.announce(base.path)
        changed = frozen_changes(base, adapter)
        if changed:
            raise AscendSpeedError(
                f"{load} replaces {', '.join(changed)} without naming them in modules_to_save or bias, "
                "so that peft would keep them as they are; merge it first (asd-ckpt merge-lora), and train the result"
            )
        return loaded_adapters(base, adapter), None
    where = str(base.path or config.start.model_config_file)
    return drawn_adapters(base, plan_adapters(lora, base.config, where), config.training.seed), None


def _check_base(source: WeightSource, checkpoint: NativeSource) -> None:
    """Refuse adapters beside other weights than those that they were trained beside."""
    known = checkpoint.description.get("run", {}).get(BASE_KEY)
    if isinstance(source, AdaptedWeights) and known is not None and known != fingerprint(source.untouched):
        raise AscendSpeedError(
            f"{source.path} holds other weights than the adapters in {checkpoint.path} were trained beside; give the "
            "same --load, or start anew with another --save and --lora-load"
        )


def _check_dropout(config: PretrainConfig, source: WeightSource) -> None:
    """Refuse a config.json that would have training drop something, unless the options say whether to.

    Raises:
        ConfigError: they do not.
    """
    path = config.start.model_config_file
    if path is None and stored_source(source).kind == "huggingface" and source.path is not None:
        path = source.path / "config.json"
    for name, share in (dropout_of(path) if path is not None else {}).items():
        if share and name not in config.dropout.model_fields_set:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{path}: {name}={share:g}, but this run would drop nothing there; give {flag} {share:g} to train as "
                f"the config says, or {flag} 0 to train without"
            )


def _check_pipeline(config: PretrainConfig, layout: Layout, model: ModelConfig) -> None:
    batch = config.batch
    if batch.optimized_pipeline and layout.pp == 1:
        raise ConfigError(
            "optimized_pipeline=true was given for pipeline_model_parallel_size=1, which has no pipeline; choose 2 or "
            "more, or leave it out"
        )
    if batch.finds_sizes and layout.schedule != "1f1b":
        raise ConfigError(
            f"manual_mbs=auto plans the schedule 1f1b, not {layout.schedule}; write the sizes out, or leave one out"
        )
    size, per_micro_step = batch.resolve_global_batch_size(layout.dp), batch.micro_batch_size * layout.dp
    start, increment, _ = batch.rampup_batch_size or (size, size, 0)
    for samples in range(start, size + 1, increment or size):
        layout.check_micro_batches(len(batch.manual_sizes()) or samples // per_micro_step)
    _check_fitted(config, layout)
    held = stages_of_ranks(model.num_layers, layout)
    config.recompute.check_pipeline(
        layout.schedule, [sum(len(stage.layers) for stage in own) for own in held]
    )


def _check_fitted(config: PretrainConfig, layout: Layout) -> None:
    if not config.recompute.is_fitted:
        return
    if layout.zero_stage is not None:
        raise ConfigError(
            f"checkpoint_policy=auto with zero_stage={layout.zero_stage}: how much memory DeepSpeed's buffers take is "
            "its own matter; choose another policy"
        )


def _check_length(config: PretrainConfig, model: ModelConfig, where: str) -> None:
    limit = config.model.max_position_embeddings or model.max_position_embeddings
    if config.data.seq_length > limit:
        raise AscendSpeedError(
            f"seq_length={config.data.seq_length} is more than max_position_embeddings={limit} of {where}; "
            f"choose {limit} or less"
        )


def _check_vocabulary(config: PretrainConfig, source: WeightSource, manifest: DatasetManifest | None) -> None:
    """Compare the data's tokenizer with the model's vocabulary, and with the tokenizer given or beside the weights."""
    if manifest is None:
        return
    if manifest.tokenizer.vocab_size > source.config.vocab_size:
        raise AscendSpeedError(
            f"{config.data.words()[-1]} was made with a tokenizer of vocab_size={manifest.tokenizer.vocab_size}, "
            f"the model has vocab_size={source.config.vocab_size}; tokenize with the model's tokenizer"
        )
    tokenizer = config.data.tokenizer_name_or_path or source.tokenizer
    if tokenizer is not None:
        from ascendspeed_data.manifest import check_tokenizer
        from ascendspeed_data.tokenizer import load_tokenizer

        check_tokenizer(manifest, load_tokenizer(tokenizer))


def _initial_state(config: PretrainConfig, source: NativeSource | None, order: dict[str, Any]) -> TrainState:
    is_anew = config.start.finetune or (config.takes_weights_only and not _is_of_run(config, source))
    if source is None or is_anew:
        return TrainState(0, 0, 0, 0, order)
    state = load_train_state(source)
    if state.iteration == 0:
        return TrainState(0, 0, 0, 0, order)
    run, _ = migrate_config(source.description.get("run", {}), str(source.folder))
    check_data_order(str(source.path), run, state.data_order, order)
    if config.start.load_optim:
        check_optimizer(source, config.optimizer)
    steps = state.optimizer_steps if config.start.load_optim else 0
    return TrainState(state.iteration, state.consumed_samples, state.skipped_samples, steps, order)


def _is_of_run(config: PretrainConfig, source: NativeSource | None) -> bool:
    """Whether it is a checkpoint in the folder that the run saves to."""
    folder = config.checkpoint.save
    return (
        folder is not None
        and source is not None
        and folder.resolve() in (source.folder.resolve(), source.folder.resolve().parent)
    )


def _check_save_folder(config: PretrainConfig, source: NativeSource | None, state: TrainState) -> None:
    folder = config.checkpoint.save
    if folder is None:
        announce("save: no --save given; nothing of this run will be kept")
        return
    later = [iteration for iteration in saved_iterations(folder) if iteration > state.iteration]
    if saved_iterations(folder) and not _is_of_run(config, source):
        raise AscendSpeedError(
            f"{folder} already holds checkpoints of a run (newest: iteration {saved_iterations(folder)[-1]}); "
            f"give --load {folder} to go on with it, or another --save"
        )
    if later:
        raise AscendSpeedError(
            f"{folder} holds iteration {later[-1]}, later than the {state.iteration} this run would start from; "
            "load the newest, or choose another --save"
        )
