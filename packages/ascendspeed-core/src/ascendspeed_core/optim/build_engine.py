"""Choose the engine of a run, native or DeepSpeed, and write the config that DeepSpeed gets."""

from math import log2
from typing import Any

from ascendspeed_core.config.deepspeed import (
    RunValues,
    check_deepspeed_config,
    engine_settings,
    read_deepspeed_config,
)
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.optim.engine import Engine
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import ConfigError


def check_zero(config: PretrainConfig, layout: Layout) -> None:
    """Refuse what does not go with DeepSpeed.

    Raises:
        ConfigError: options that exclude each other.
        AscendSpeedError: DeepSpeed's JSON contradicts the run, or says what is not taken over.
    """
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


def make_engine(
    model: Transformer, config: PretrainConfig, mesh: ParallelMesh, settings: dict[str, Any] | None
) -> Engine:
    """Return the engine that computes and applies the gradients of `model`.

    Args:
        model: this rank's part, ready to train.
        config: of the run.
        mesh: of this rank.
        settings: of `zero_settings`.
    """
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
