"""Choose the engine of a run: this project's, DeepSpeed or megatron-core; check what it is asked for, and make it."""

from math import log2
from typing import Any

import torch

from ascendspeed_core.build import apply_kernels, load_model
from ascendspeed_core.config.deepspeed import (
    RunValues,
    check_deepspeed_config,
    engine_settings,
    read_deepspeed_config,
)
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.megatron import LayerOptions, check_megatron, read_megatron_args, shapes_vary
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.device import choose_device
from ascendspeed_core.kernels.registry import Choice, KernelContext, update_choice
from ascendspeed_core.launch import world_of_environment
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.optim.engine import Engine
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import apply_recompute
from ascendspeed_core.parallel.router_steps import train_routers
from ascendspeed_core.weights.source import WeightSource
from ascendspeed_data.errors import ConfigError


def check_engine(config: PretrainConfig, layout: Layout, model: ModelConfig) -> None:
    """Refuse what does not go with the engine of a run.

    Raises:
        ConfigError: options that exclude each other, or that the engine lacks.
        AscendSpeedError: a file of the engine's own settings contradicts the run, or says what is not taken over; the
            engine does not compute on this device.
    """
    if config.parallel.chosen_engine == "megatron":
        check_megatron(config, layout, model)
        from ascendspeed_core.optim.megatron.core import (
            check_sharded_optimizer,
            check_transformer_engine,
            prepare,
        )

        prepare(choose_device(config.launch.device, world_of_environment().local_rank, quiet=True))
        if config.parallel.fp8 is not None:
            check_transformer_engine(config.parallel.fp8)
        if layout.sharded_optimizer:
            check_sharded_optimizer()
        megatron_fields(config)
        return
    _check_zero(config, layout)


def megatron_fields(config: PretrainConfig) -> dict[str, dict[str, Any]]:
    """Return the further fields of megatron-core's configs that a run gives, checked; none under other engines.

    Raises:
        AscendSpeedError: its file cannot be read, or gives what there is not, or what the run decides.
    """
    path = config.parallel.megatron_args
    if path is None:
        return {}
    from ascendspeed_core.optim.megatron.further_fields import check_fields

    return check_fields(read_megatron_args(path), path)


def _check_zero(config: PretrainConfig, layout: Layout) -> None:
    stage = layout.zero_stage
    if stage is None:
        return
    if config.precision.dtype_name == "float64":
        raise ConfigError(
            f"zero_stage={stage} with dtype=float64: DeepSpeed keeps master weights in fp32, so the run would be no "
            "more exact than that; give --dtype float32"
        )
    if config.compute.mlp_layer_fusion:
        raise ConfigError(
            f"zero_stage={stage} with mlp_layer_fusion=true: DeepSpeed lays the weights out itself, so that those of "
            "one product do not stay together; leave one of them out"
        )
    path = config.parallel.deepspeed_config
    if path is not None:
        check_deepspeed_config(read_deepspeed_config(path), path, _run_values(config, layout))


def zero_settings(config: PretrainConfig, model: ModelConfig, layout: Layout) -> dict[str, Any] | None:
    """Return the config of `deepspeed.initialize`; `None` when the run does without DeepSpeed."""
    if layout.zero_stage is None:
        return None
    path = config.parallel.deepspeed_config
    given = read_deepspeed_config(path) if path is not None else {}
    embedding = model.vocab_size * model.hidden_size
    layers = model.num_parameters - embedding * (1 if model.tie_word_embeddings else 2)
    largest_unit = max(embedding, layers // model.num_layers) // layout.tp
    parameters = model.num_parameters // layout.tp
    return engine_settings(given, _run_values(config, layout), parameters, largest_unit)


def make_model(
    source: WeightSource,
    config: PretrainConfig,
    mesh: ParallelMesh,
    dtype: torch.dtype,
    settings: dict[str, Any] | None,
) -> Transformer:
    """Return this rank's part of the model that a run trains, as its engine wants it.

    Args:
        source: the weights.
        config: of the run.
        mesh: of this rank.
        dtype: of the weights.
        settings: of `zero_settings`.
    """
    if config.parallel.chosen_engine != "megatron":
        return load_model(source, mesh, dtype, config.compute.mlp_layer_fusion, settings)
    from ascendspeed_core.optim.megatron.model import load_megatron_model

    fields, vary = megatron_fields(config).get("TransformerConfig", {}), shapes_vary(config)
    options = LayerOptions.of_run(config)
    return load_megatron_model(source, mesh, dtype, config.recompute, vary, fields, options)


def prepare_model(
    model: Transformer, config: PretrainConfig, mesh: ParallelMesh, context: KernelContext
) -> list[Choice]:
    """Give a model of `make_model` its kernels, what its routers train for, and what is recomputed, in place.

    Args:
        model: this rank's part.
        config: of the run.
        mesh: of this rank.
        context: where it runs.

    Returns:
        Which kernels were chosen.
    """
    if config.parallel.chosen_engine == "megatron":
        from ascendspeed_core.optim.megatron.model import MegatronTransformer, choose_kernels

        assert isinstance(model, MegatronTransformer)
        train_routers(model, config.experts)
        return choose_kernels(model, config.compute, context)
    choices = apply_kernels(model, config.compute, context)
    train_routers(model, config.experts)
    apply_recompute(model, config.recompute, mesh.pp_rank)
    return [*choices, update_choice(config.optimizer.optimizer, context)]


def make_engine(
    model: Transformer, config: PretrainConfig, mesh: ParallelMesh, settings: dict[str, Any] | None
) -> Engine:
    """Return the engine that computes and applies the gradients of `model`.

    Args:
        model: of `make_model`, ready to train.
        config: of the run.
        mesh: of this rank.
        settings: of `zero_settings`.
    """
    if config.parallel.chosen_engine == "megatron":
        from ascendspeed_core.optim.megatron.engine import MegatronEngine
        from ascendspeed_core.optim.megatron.model import MegatronTransformer

        assert isinstance(model, MegatronTransformer)
        return MegatronEngine(model, config.optimizer, mesh, megatron_fields(config))
    if settings is None:
        return NativeEngine(model, config.optimizer, mesh)
    from ascendspeed_core.optim.deepspeed import ZeroEngine

    return ZeroEngine(model, config.optimizer, mesh, settings)


def _run_values(config: PretrainConfig, layout: Layout) -> RunValues:
    optimizer, scaling, stage = config.optimizer, config.loss_scaling, layout.zero_stage
    assert stage is not None
    return RunValues(
        micro_batch_size=config.batch.micro_batch_size,
        global_batch_size=config.batch.resolve_global_batch_size(layout.dp),
        dp=layout.dp,
        zero_stage=stage,
        dtype=config.precision.dtype_name,
        clip_grad=optimizer.clip_grad,
        optimizer=optimizer.optimizer,
        lr=optimizer.lr,
        betas=(optimizer.adam_beta1, optimizer.adam_beta2),
        eps=optimizer.adam_eps,
        weight_decay=optimizer.weight_decay,
        loss_scale=scaling.loss_scale or 0,
        initial_scale_power=log2(scaling.initial_loss_scale),
        loss_scale_window=scaling.loss_scale_window,
        hysteresis=scaling.hysteresis,
        min_loss_scale=scaling.min_loss_scale,
    )
