"""What a run under megatron-core may ask for: what it lacks, by name, and further fields of its configs; no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_data.errors import ConfigError, did_you_mean
from ascendspeed_data.small_files import JsonObject, read_json

CONFIG_CLASSES = ("TransformerConfig", "OptimizerConfig", "DistributedDataParallelConfig")
"""megatron-core's configs whose fields `--megatron-args` may give."""


@dataclass(frozen=True)
class LayerOptions:
    """What layers compute besides what the model says.

    Attributes:
        expert_capacity: see `moe_expert_capacity_factor`.
        fp8: format in which linear layers multiply; `None` for that of the weights.
        fp8_recipe: how they scale.
    """

    expert_capacity: float | None = None
    fp8: str | None = None
    fp8_recipe: str = "delayed"

    @classmethod
    def of_run(cls, config: PretrainConfig) -> "LayerOptions":
        """Return those of a run."""
        capacity, parallel = config.experts.moe_expert_capacity_factor, config.parallel
        return cls(capacity, parallel.fp8, parallel.fp8_recipe or "delayed")


@dataclass(frozen=True)
class LackingOption:
    """An option of a run that the engine does not have.

    Attributes:
        section: of the config.
        name: of the option.
        values: those that it lacks; `None` for all but the default.
        reason: why.
    """

    section: str
    name: str
    values: tuple[Any, ...] | None
    reason: str

    def is_asked(self, config: PretrainConfig) -> bool:
        """Whether a run asks for it."""
        section = getattr(config, self.section)
        value = getattr(section, self.name)
        if self.values is not None:
            return value in self.values
        return bool(value != type(section).model_fields[self.name].default)


_OWN_LAYERS = "that part of a layer is megatron-core's"
LOGITS_ONLY = "its last stage gives logits, never hidden states alone"

LACKING_OPTIONS = (
    LackingOption(
        "parallel", "pipeline_schedule", ("gpipe", "looped-bfs", "interleaved-zb", "zbv", "dualpipev"),
        "its schedules are 1f1b and interleaved",
    ),
    LackingOption("parallel", "foldx_mode", None, "Fold3D's schedules are this project's"),
    LackingOption("batch", "manual_mbs", ("auto",), "single passes are measured for it, and it runs whole steps"),
    LackingOption(
        "recompute", "checkpoint_policy", ("custom", "selective", "auto"),
        "it recomputes all layers, the first of each stage, or attention: full, block, attention",
    ),
    *(
        LackingOption("compute", name, None, _OWN_LAYERS)
        for name in ("scaled_masked_softmax", "rotary", "swiglu", "token_permutation", "grouped_product")
    ),
    LackingOption("compute", "cross_entropy", ("hidden",), LOGITS_ONLY),
    *(
        LackingOption("dropout", name, None, "what it drops depends on the layout")
        for name in ("hidden_dropout", "attention_dropout")
    ),
    LackingOption(
        "experts", "moe_pad_expert_input_to_capacity", None, "it leaves the rows of experts as many as there are"
    ),
    LackingOption("eval_prompts", "eval_prompts", None, "its model does not generate"),
)  # fmt: skip
"""Options that `--engine ascendspeed` has and this engine lacks."""


@dataclass(frozen=True)
class LackingModel:
    """Something of a model that `GPTModel` does not express.

    Attributes:
        what: the fields of `ModelConfig`, and which values.
        reason: why.
        has: whether a model has it.
    """

    what: str
    reason: str
    has: Callable[[ModelConfig], bool]


def _is_plain_yarn(model: ModelConfig) -> bool:
    scaling = model.rotary_scaling
    return scaling is not None and scaling.kind == "yarn" and model.kv_latent_dim is None


def _has_some_biases(model: ModelConfig) -> bool:
    return model.mlp_bias and not (model.qkv_bias and model.output_bias)


LACKING_MODELS = (
    LackingModel(
        "experts.biases, experts.clamp", "its experts are plain SwiGLU",
        lambda model: model.experts is not None and (model.experts.biases or model.experts.clamp is not None),
    ),
    LackingModel(
        "rotary_scaling=yarn without kv_latent_dim", "its plain attention sharpens scores by a factor of its own",
        _is_plain_yarn,
    ),
    LackingModel(
        "window_layers, rotary_layers, window_rotary_base", "its layers share one mask and one rotary embedding",
        lambda model: any(
            value is not None for value in (model.window_layers, model.rotary_layers, model.window_rotary_base)
        ),
    ),
    LackingModel(
        "rotary_interleaved=true without kv_latent_dim, or false with it",
        "it pairs halves, and neighbours in latent attention",
        lambda model: model.rotary_interleaved != (model.kv_latent_dim is not None),
    ),
    LackingModel(
        "attention_softcap, attention_sinks", "its attention leaves scores as they are",
        lambda model: model.attention_softcap is not None or model.attention_sinks,
    ),
    LackingModel(
        "qk_norm_kind=by_head or all_heads", "its norms of queries and keys share one weight",
        lambda model: model.qk_norm and model.qk_norm_kind != "shared",
    ),
    LackingModel(
        "norm_placement=after or both, parallel_blocks=true", "its norms stand before attention and MLP",
        lambda model: model.norm_placement != "before" or model.parallel_blocks,
    ),
    LackingModel(
        "embedding_multiplier, residual_multiplier, logits_multiplier, logits_softcap", "it multiplies by 1",
        lambda model: (model.embedding_multiplier, model.residual_multiplier, model.logits_multiplier) != (1, 1, 1)
        or model.logits_softcap is not None,
    ),
    LackingModel("normalised_head=true", "its head is a plain product", lambda model: model.normalised_head),
    LackingModel(
        "mlp_bias=true without qkv_bias and output_bias", "it has biases in all layers or none", _has_some_biases
    ),
)  # fmt: skip
"""What models have that `GPTModel` lacks; docs/refused.md has the published models that have it."""


def check_megatron(config: PretrainConfig, layout: Layout, model: ModelConfig) -> None:
    """Refuse what megatron-core lacks.

    Args:
        config: of the run.
        layout: of all ranks.
        model: the architecture.

    Raises:
        ConfigError: the run asks for something that it does not have; the message says which engine has it.
    """
    for lacking in LACKING_OPTIONS:
        if lacking.is_asked(config):
            value = getattr(getattr(config, lacking.section), lacking.name)
            raise ConfigError(
                f"engine=megatron with {lacking.name}={value}: {lacking.reason}; leave it out, or give --engine "
                "ascendspeed, which has it"
            )
    for missing in LACKING_MODELS:
        if missing.has(model):
            raise ConfigError(
                f"engine=megatron for a model of family {model.family} ({missing.what}): {missing.reason}; give "
                "--engine ascendspeed, which has it"
            )
    if layout.tp > 1 and not layout.sequence_parallel:
        parts = {"experts": model.experts is not None, "latent attention": model.kv_latent_dim is not None}
        for part in (name for name, is_there in parts.items() if is_there):
            raise ConfigError(
                f"engine=megatron with tensor_model_parallel_size={layout.tp} for a model with {part}: it wants a part "
                "of the sequence on each rank; give --sequence-parallel too"
            )
    if config.parallel.fp8 is not None and config.precision.dtype_name == "float64":
        raise ConfigError(
            f"engine=megatron with fp8={config.parallel.fp8} and dtype=float64: Transformer Engine has no float64; "
            "give --bf16"
        )
    if config.parallel.fp8 is not None and model.experts is not None:
        raise ConfigError(
            f"engine=megatron with fp8={config.parallel.fp8} for a model with experts: their rows would have to be "
            "filled up to what FP8 multiplies; leave --fp8 out"
        )
    if config.adapters is not None:
        raise ConfigError(
            "engine=megatron with adapters: peft's layers for megatron-core are out of date, and adapters are this "
            "project's plain ones; give --engine ascendspeed or --zero-stage, which train them"
        )
    if config.precision.dtype_name == "float64" and layout.sharded_optimizer:
        raise ConfigError(
            "engine=megatron with dtype=float64 and use_distributed_optimizer=true: its distributed optimizer takes "
            "fp32, bf16 and fp16 only; give --dtype float32, or --engine ascendspeed"
        )
    if shapes_vary(config) and layout.layers_per_stage is not None:
        raise ConfigError(
            f"engine=megatron with num_layers_per_virtual_pipeline_stage={layout.layers_per_stage} and micro-batches "
            "of several shapes (manual_mbs, variable_seq_lengths): the shapes that its stages tell each other cross; "
            "leave one of them out, or give --engine ascendspeed"
        )


def shapes_vary(config: PretrainConfig) -> bool:
    """Whether micro-batches differ in their number or length of samples."""
    return bool(config.batch.manual_sizes()) or config.data.lengths_vary


def read_megatron_args(path: Path) -> dict[str, dict[str, Any]]:
    """Return the fields of megatron-core's configs that a JSON file gives, by the name of the config.

    Raises:
        ConfigError: it is no object of these configs.
        AscendSpeedError: it cannot be read.
    """
    content: Mapping[str, Any] = read_json(
        path, JsonObject, f"megatron_args={path}", "correct it", option="--megatron-args"
    )
    for name, fields in content.items():
        if name not in CONFIG_CLASSES:
            raise ConfigError(
                f"{path}: {name} is none of megatron-core's configs{did_you_mean(name, CONFIG_CLASSES)}; there are "
                f"{', '.join(CONFIG_CLASSES)}"
            )
        if not isinstance(fields, dict):
            raise ConfigError(f"{path}: {name} must be an object of its fields; write {{...}}")
    return {name: dict(fields) for name, fields in content.items()}
