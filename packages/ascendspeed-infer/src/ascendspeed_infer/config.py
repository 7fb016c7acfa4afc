"""Options of the commands of `asd-infer`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ascendspeed_core.config.base import Config, spellings
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ArchitectureFlags, WeightQuantization
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.recipes import RecipeConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.config.training import LaunchConfig, PrecisionConfig
from ascendspeed_data.errors import ConfigError
from ascendspeed_data.template_values import DATE_HELP, KWARGS_HELP, TemplateValues


class TokenizerConfig(Config):
    """Which tokenizer, when the checkpoint came without one."""

    tokenizer_name_or_path: Path | None = Field(
        None, description="Tokenizer folder. [default: the checkpoint's own]"
    )
    tokenizer_type: str = Field(
        "PretrainedFromHF", description="Kind of tokenizer; PretrainedFromHF is the only one."
    )
    tokenizer_not_use_fast: bool = Field(
        False,
        description="Accepted for old scripts: ids are exact either way.",
        json_schema_extra={"off": ""},
    )


class AnswerConfig(Config):
    """How one text is continued, token by token."""

    max_new_tokens: int = Field(512, ge=1, description="Most tokens to generate.")
    do_sample: bool = Field(False, description="Draw tokens at random; without it the likeliest is taken.")
    temperature: float = Field(1.0, gt=0, description="Above 1 makes draws more random, below 1 less.")
    top_k: int = Field(0, ge=0, description="Draw only from the k likeliest tokens; 0 is all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw only from the smallest set with this probability."
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="Above 1 makes tokens that already occur in prompt or text less likely."
    )
    seed: int = Field(1234, description="Seed of the draws of each prompt, and of random weights.")
    stop: tuple[str, ...] = Field((), description="Strings that end a completion; the text ends before them.")
    eos_token_ids: tuple[int, ...] | None = Field(
        None,
        description="Ids that end a completion. [default: the model's]",
        json_schema_extra=spellings("--eos-token-id"),
    )
    ignore_eos: bool = Field(
        False, description="Do not stop at end-of-text ids.", json_schema_extra={"off": ""}
    )
    parse_special: bool = Field(
        False,
        description="Read special pieces that a prompt or message spells, such as <|im_end|>, as control; without it "
        "they are text.",
        json_schema_extra={"off": ""},
    )

    @field_validator("stop", "eos_token_ids", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int) else value

    @model_validator(mode="after")
    def _check_ends(self) -> Self:
        if any(not stop for stop in self.stop):
            raise ValueError("stop holds an empty text, which would end every completion; leave it out")
        if self.ignore_eos and self.eos_token_ids:
            raise ValueError("ignore_eos and eos_token_ids contradict each other; give one")
        return self

    def ineffective_options(self) -> list[str]:
        """Say which given options change nothing, and what would make them count."""
        idle = (
            []
            if self.do_sample
            else [name for name in self._sampling_options() if name in self.model_fields_set]
        )
        return [
            f"{name} has no effect without do_sample"
            for name in idle
            if name != "temperature" or self.temperature != 1
        ]

    def effective_options(self) -> dict[str, Any]:
        """Return the options that were given, without those that change nothing."""
        given = self.model_dump(exclude_unset=True)
        return {
            name: value
            for name, value in given.items()
            if self.do_sample or name not in self._sampling_options()
        }

    def _sampling_options(self) -> tuple[str, ...]:
        return ("temperature", "top_k", "top_p")


class SamplingConfig(AnswerConfig):
    """How texts are continued; every field is an option of `LanguageModel.generate` too."""

    max_new_tokens: int = Field(128, ge=1, description="Most tokens to generate.")
    max_length: int | None = Field(
        None, ge=2, description="Tokens of prompt and continuation together, in place of --max-new-tokens."
    )
    num_beams: int = Field(1, ge=1, description="Number of beams; above 1 is beam search.")
    length_penalty: float = Field(
        1.0, description="Scores of beams are divided by length to this power; above 0 prefers long texts."
    )
    early_stopping: bool | Literal["never"] = Field(
        False,
        description="When beam search ends: once --num-beams texts are finished (true), when the best running beam is "
        "worse than all of them (false), or when it could not become better (never).",
    )
    num_return_sequences: int = Field(
        1,
        ge=1,
        description="Completions per prompt: the best beams, or draws with the seeds that follow --seed.",
    )
    return_log_probs: bool = Field(
        False,
        description="Return the natural logarithm of each new token's probability.",
        json_schema_extra={"off": ""},
    )
    echo: bool = Field(
        False,
        description="Begin the text with the prompt.",
        json_schema_extra=spellings("--include-input", off=""),
    )
    detokenize: bool = Field(True, description="Return text, not only ids.")
    batch_size: int = Field(8, ge=1, description="Sequences computed at once.")
    batch_invariant: bool = Field(
        False,
        description="Give each completion the same bit for bit whatever else is computed with it. Slower. Without it, "
        "other prompts can change which of two nearly equally likely tokens is taken.",
        json_schema_extra={"off": ""},
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_length is not None and "max_new_tokens" in self.model_fields_set:
            raise ValueError("max_length and max_new_tokens were both given; give one")
        if self.num_return_sequences > 1 and not self.do_sample and self.num_beams == 1:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} would give the same greedy text each time; add "
                "do_sample or num_beams"
            )
        if self.num_beams > 1 and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} is more than num_beams={self.num_beams}; give more "
                "beams or ask for fewer texts"
            )
        return self

    def ineffective_options(self) -> list[str]:
        """Say which given options change nothing, and what would make them count."""
        lines = super().ineffective_options()
        if self.num_beams == 1:
            beams = ("length_penalty", "early_stopping")
            lines += [
                f"{name} has no effect without num_beams" for name in beams if name in self.model_fields_set
            ]
        return lines

    def _sampling_options(self) -> tuple[str, ...]:
        """Leave out the filters of a beam search, which choose among its scores."""
        return super()._sampling_options() if self.num_beams == 1 else ("temperature",)


class LayoutConfig(Config):
    """How a model is distributed over devices for inference."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="Devices that share every layer (tp).")
    pipeline_model_parallel_size: int = Field(
        1,
        ge=1,
        description="Pipeline stages that the layers are split into (pp); they need not be equally long.",
    )
    expert_model_parallel_size: int = Field(
        1, ge=1, description="Devices among those of tp that share out the experts of each layer (ep)."
    )
    expert_tensor_parallel_size: int | None = Field(
        None,
        ge=1,
        description="Devices that share every expert (etp). [default: --tensor-model-parallel-size]",
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        None,
        description="Run under DeepSpeed. 3 shards the weights over the data-parallel processes; 1 and 2 "
        "shard only what "
        "training needs, and change nothing here.",
    )
    deepspeed: bool = Field(
        False,
        description="Run under DeepSpeed, as --deepspeed_config or --zero-stage says.",
        json_schema_extra={"off": ""},
    )
    deepspeed_config: Path | None = Field(
        None,
        description="DeepSpeed's JSON: its stage, and its bucket sizes.",
        json_schema_extra=spellings("--deepspeed_config"),
    )


class StoredPrecisionConfig(PrecisionConfig):
    """Number format of weights and arithmetic."""

    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = Field(
        None, description="Format of weights and arithmetic. [default: the one the weights are stored in]"
    )
    weight_quantization: WeightQuantization = Field(
        "none",
        description="int8: hold the matrices of layers and head as 8-bit integers with a scale for each row: less "
        "memory, and in bfloat16 faster decoding; arithmetic stays in --dtype.",
    )


def check_parallel(parallel: ParallelConfig) -> None:
    """Refuse what a layout can only do in training.

    Raises:
        ConfigError: it names such a field.
    """
    plain = ParallelConfig(**{name: getattr(parallel, name) for name in LayoutConfig.model_fields})
    for name in type(parallel).model_fields:
        if getattr(parallel, name) != getattr(plain, name):
            raise ConfigError(
                f"{name}={getattr(parallel, name)} is for training and has no use in inference; leave it out"
            )


def inference_layout(parallel: ParallelConfig, world_size: int) -> Layout:
    """Return the layout of inference; every process must hold a part of the model, unless ZeRO was asked for.

    Raises:
        ConfigError: some processes would only repeat what others compute.
    """
    refuse_context_parallel(parallel)
    layout = parallel.layout(world_size)
    refuse_spread_replicas(layout)
    if layout.dp > 1 and layout.zero_stage is None:
        raise ConfigError(
            f"tensor_model_parallel_size={layout.tp} leaves {world_size} processes to compute the same {layout.dp} "
            f"times; give --tensor-model-parallel-size {world_size // layout.pp}, or start {layout.tp * layout.pp}"
        )
    return layout


def refuse_spread_replicas(layout: Layout) -> None:
    """Raise `ConfigError` when replicas of a model are to share experts, though each computes texts of its own."""
    if layout.tp % (layout.ep * layout.expert_tp):
        raise ConfigError(
            f"expert_model_parallel_size={layout.ep} times expert_tensor_parallel_size={layout.expert_tp} must divide "
            f"tensor_model_parallel_size={layout.tp} in inference, where only the ranks of tp compute the same text; "
            f"give --expert-tensor-parallel-size 1 with an --expert-model-parallel-size that divides {layout.tp}"
        )


def refuse_context_parallel(parallel: ParallelConfig) -> None:
    """Raise `ConfigError` when sequences are to be cut, as decoding computes one token at a time."""
    if parallel.context_parallel_size > 1:
        raise ConfigError(
            f"context_parallel_size={parallel.context_parallel_size} cuts the sequences of training; for inference "
            "cut the layers: --tensor-model-parallel-size, --pipeline-model-parallel-size"
        )


class AdapterConfig(Config):
    """A LoRA adapter on top of the weights."""

    lora_load: Path | None = Field(
        None,
        description="Folder of a LoRA adapter in peft's format.",
        json_schema_extra=spellings("--adapter"),
    )
    merge_adapter: bool = Field(
        True,
        description="Merge the adapter into the weights while loading; --no-merge-adapter computes it "
        "beside each layer.",
    )

    @model_validator(mode="after")
    def _has_adapter(self) -> Self:
        if not self.merge_adapter and self.lora_load is None:
            raise ValueError("merge_adapter is off but there is no adapter; give --lora-load DIR")
        return self

    @property
    def by_name(self) -> Mapping[str, Path]:
        """Folders of adapters that requests choose by name."""
        return {}


class EngineConfig(Config):
    """Which engine generates."""

    engine: str = Field(
        "ascendspeed",
        description="Engine that generates: ascendspeed, transformers, vllm, or an installed one.",
    )
    engine_option: tuple[str, ...] = Field(
        (),
        description="NAME=VALUE: an argument of the engine itself, such as gpu_memory_utilization=0.3 of vllm or "
        "attn_implementation=eager of transformers.",
    )

    @field_validator("engine_option")
    @classmethod
    def _has_names(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        names = [one.partition("=")[0].strip().replace("-", "_") for one in given]
        for one, name in zip(given, names, strict=True):
            if not name.isidentifier() or "=" not in one:
                raise ValueError(f"engine_option={one} is not NAME=VALUE; correct it")
            if names.count(name) > 1:
                raise ValueError(f"engine_option={name} is given twice; keep one")
        return given

    @property
    def engine_options(self) -> dict[str, str]:
        """Arguments of the engine itself, as typed, by name."""
        parts = [one.partition("=") for one in self.engine_option]
        return {name.strip().replace("-", "_"): value for name, _, value in parts}


class LoadedModelConfig(Config):
    """What every command of inference takes."""

    recipe: RecipeConfig = RecipeConfig()
    source: ModelSourceConfig
    engine: EngineConfig = EngineConfig()
    adapter: AdapterConfig = AdapterConfig()
    model: ArchitectureFlags = ArchitectureFlags()
    tokenizer: TokenizerConfig = TokenizerConfig()
    sampling: AnswerConfig = AnswerConfig()
    layout: LayoutConfig = LayoutConfig()
    precision: StoredPrecisionConfig = StoredPrecisionConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def needs_tokenizer(self) -> bool:
        """Whether texts are wanted or looked at."""
        return True

    @property
    def parallel(self) -> ParallelConfig:
        """The layout as the model is cut by it."""
        return validate(ParallelConfig, self.layout.model_dump())


class GenerateConfig(LoadedModelConfig):
    """Everything `asd-infer generate` takes."""

    sampling: SamplingConfig = SamplingConfig()

    @property
    def needs_tokenizer(self) -> bool:
        """Whether texts are wanted or looked at; prompts of ids need no tokenizer."""
        return self.sampling.detokenize or bool(self.sampling.stop)


class ScoringConfig(Config):
    """How a benchmark's requests are computed."""

    micro_batch_size: int = Field(
        8, ge=1, description="Prompts continued at once; does not change the result."
    )
    seq_length: int | None = Field(
        None,
        ge=1,
        description="Longest prompt and answer in tokens; longer ones are truncated from the left, and "
        "counted in the report. [default: the "
        "protocol's, at most the model's]",
    )


class EvalConfig(LoadedModelConfig):
    """What this package adds to `asd-eval run`."""

    scoring: ScoringConfig = ScoringConfig()


class TemplateConfig(Config):
    """How a conversation is laid out."""

    chat_template: str | None = Field(
        None,
        description="tokenizer, instruction, baichuan2, plain, the name of one of the tokenizer's templates, or a "
        "Jinja file. [default: what the checkpoint was trained with, or else the tokenizer's own]",
    )
    chat_template_kwargs: str | None = Field(
        None, description=f"{KWARGS_HELP} [default: those that training recorded]"
    )
    chat_template_date: str | None = Field(None, description=f"{DATE_HELP} [default: the day of the run]")

    def template_values(self) -> TemplateValues:
        """Return what the chat template gets besides the messages."""
        return TemplateValues.of_flags(self.chat_template_kwargs, self.chat_template_date, clock=True)


class ConversationConfig(TemplateConfig):
    """How a conversation is laid out, what it begins with, and how it is shown."""

    system: str | None = Field(None, description="System message before the first turn.")
    tools: Path | None = Field(
        None,
        description="JSON file with a list of tools that the model may call; the chat template shows them.",
    )
    hide_thinking: bool = Field(
        False,
        description="Do not show what the model thinks before its answers; on a terminal thoughts are dimmed.",
        json_schema_extra={"off": ""},
    )


class ChatConfig(LoadedModelConfig):
    """Everything `asd-infer chat` takes."""

    conversation: ConversationConfig = ConversationConfig()
