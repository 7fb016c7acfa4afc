"""How one model is spread over devices; pure arithmetic, no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config, spellings
from ascendspeed_core.config.deepspeed import read_deepspeed_config, stage_of
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_data.errors import ConfigError

PipelineSchedule = Literal["1f1b", "gpipe", "looped-bfs", "interleaved", "interleaved-zb", "zbv", "dualpipev"]
"""Orders of forwards and backwards:

- `1f1b`: one stage a device, one forward and one backward in turn (Narayanan et al., 2021, PipeDream-Flush).
- `gpipe`: all forwards, then all backwards (Huang et al., 2019).
- `looped-bfs`: several stages a device, each for all micro-batches in turn (Lamy-Poirier, 2022, breadth-first).
- `interleaved`: several stages a device, dealt out in turn (Narayanan et al., 2021, Megatron-LM, section 2.2).
- `interleaved-zb`: the same, with the gradients of the weights moved into the bubble (Qi et al., 2023, ZB1P).
- `zbv`, `dualpipev`: two stages a device, down and up again like a V (Qi et al., 2024; DeepSeek-AI, 2025).
"""

V_SCHEDULES = ("zbv", "dualpipev")
"""The first device holds the first and the last stage."""

INTERLEAVED_SCHEDULES = ("interleaved", "interleaved-zb", "looped-bfs")
"""Several stages a device, dealt out in turn."""

SPLIT_BACKWARD_SCHEDULES = ("interleaved-zb", "zbv", "dualpipev")
"""Gradients of inputs first and of weights later: autograd goes through a layer twice."""

FOLD_SCHEDULES = {"aiao": "looped-bfs", "fifo": "interleaved"}
"""What the fold modes of the 2023 system are called today."""


class ParallelConfig(Config):
    """Sizes of the parallel dimensions; what is left of the devices is data parallel."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="Devices that share every layer (tp).")
    pipeline_model_parallel_size: int = Field(
        1, ge=1, description="Stages that the layers are cut into (pp); they need not be equally long."
    )
    context_parallel_size: int = Field(
        1,
        ge=1,
        description="Devices that share every sequence (cp): each has a part of its tokens, and in attention a part "
        "of its heads.",
    )
    sequence_parallel: bool = Field(
        False,
        description="Cut the sequence too, where layers are not cut: less memory for activations. Needs tp > 1.",
    )
    use_distributed_optimizer: bool = Field(
        False,
        description="Cut optimizer state and master weights over the devices that hold the same weights, dp x cp "
        "(ZeRO-1).",
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        None,
        description="Train under DeepSpeed: cut over the data-parallel devices the optimizer's state (1), the "
        "gradients too (2), the weights too (3). Needs ascendspeed-core[deepspeed].",
    )
    deepspeed: bool = Field(
        False,
        description="Train under DeepSpeed, as --deepspeed_config or --zero-stage says.",
        json_schema_extra={"off": ""},
    )
    deepspeed_config: Path | None = Field(
        None,
        description='DeepSpeed\'s JSON; what the run says too must be equal there, or "auto".',
        json_schema_extra=spellings("--deepspeed_config"),
    )
    num_layers_per_virtual_pipeline_stage: int | None = Field(
        None,
        ge=1,
        description="Give each rank several stages of this many layers, in turn: a smaller bubble, more messages.",
    )
    pipeline_schedule: PipelineSchedule | None = Field(
        None,
        description="Order of forwards and backwards. [default: 1f1b; interleaved with several stages a device]",
    )
    foldx_mode: Literal["aiao", "fifo"] | None = Field(
        None,
        description="Add up the gradients of a stage over the data-parallel devices while the device's other stages "
        "still compute: aiao runs looped-bfs, fifo interleaved. Needs several stages a device.",
        json_schema_extra=spellings("--fold-mode"),
    )

    @model_validator(mode="after")
    def _schedule_fits_stages(self) -> "ParallelConfig":
        several, schedule = self.num_layers_per_virtual_pipeline_stage is not None, self.pipeline_schedule
        if (several or schedule) and self.pipeline_model_parallel_size == 1:
            given = "num_layers_per_virtual_pipeline_stage" if several else f"pipeline_schedule={schedule}"
            raise ValueError(
                f"{given} was given for pipeline_model_parallel_size=1, which has no pipeline; choose 2 or more, or "
                "leave it out"
            )
        if several and schedule not in (None, *INTERLEAVED_SCHEDULES):
            raise ValueError(
                f"num_layers_per_virtual_pipeline_stage goes with {', '.join(INTERLEAVED_SCHEDULES)}, not with "
                f"pipeline_schedule={schedule}; leave one of them out"
            )
        if self.foldx_mode and (not several or schedule not in (None, FOLD_SCHEDULES[self.foldx_mode])):
            wanted = FOLD_SCHEDULES[self.foldx_mode]
            raise ValueError(
                f"foldx_mode={self.foldx_mode} needs --num-layers-per-virtual-pipeline-stage N and runs "
                f"pipeline_schedule={wanted}; leave --pipeline-schedule out"
            )
        if schedule in INTERLEAVED_SCHEDULES and not several:
            raise ValueError(
                f"pipeline_schedule={schedule} needs several stages a device; give "
                "--num-layers-per-virtual-pipeline-stage N"
            )
        return self

    @model_validator(mode="after")
    def _deepspeed_fits(self) -> "ParallelConfig":
        if self.deepspeed and self.zero_stage is None and self.deepspeed_config is None:
            raise ValueError(
                "deepspeed=true needs a stage; give --zero-stage 1, 2 or 3, or --deepspeed_config FILE"
            )
        if self.deepspeed_config is not None and not self.deepspeed:
            raise ValueError(
                f"deepspeed_config={self.deepspeed_config} means nothing without --deepspeed; give it too"
            )
        if self.zero_stage is None and not self.deepspeed:
            return self
        asked = f"zero_stage={self.zero_stage}" if self.zero_stage else "deepspeed=true"
        if self.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"{asked} with pipeline_model_parallel_size={self.pipeline_model_parallel_size}: DeepSpeed cuts the "
                "gradients of a step as they come, which a pipeline's stages would wait for; use "
                "--use-distributed-optimizer with a pipeline, or tensor parallelism with ZeRO"
            )
        if self.sequence_parallel:
            raise ValueError(
                f"{asked} with sequence_parallel=true: the norms' gradients would have to be added up over the "
                "tensor-parallel devices before DeepSpeed cuts them; leave one of them out"
            )
        if self.use_distributed_optimizer:
            raise ValueError(
                f"{asked} and use_distributed_optimizer=true both cut the optimizer's state; give one of them"
            )
        return self

    def resolved_zero_stage(self) -> int | None:
        """Return the ZeRO stage of DeepSpeed, from the flag or its JSON; `None` without DeepSpeed.

        Raises:
            AscendSpeedError: the JSON cannot be read, or has no stage or another one.
        """
        if self.deepspeed_config is None:
            return self.zero_stage
        return self.zero_stage or stage_of(
            read_deepspeed_config(self.deepspeed_config), self.deepspeed_config
        )

    def layout(self, world_size: int) -> "Layout":
        """Return the layout on `world_size` devices.

        Raises:
            ConfigError: tp times pp does not divide the number of devices, or a flag needs more of them.
            AscendSpeedError: DeepSpeed's JSON cannot be read.
        """
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        cp = self.context_parallel_size
        if pp == cp == 1 and world_size % tp:
            raise ConfigError(
                f"tensor_model_parallel_size={tp} does not divide the {world_size} processes; "
                f"choose one of {', '.join(map(str, divisors(world_size)))} or start a multiple of {tp}"
            )
        if world_size % (tp * pp * cp):
            sizes = {"tensor_model": tp, "context": cp, "pipeline_model": pp}
            asked = " times ".join(
                f"{name}_parallel_size={size}" for name, size in sizes.items() if name != "context" or cp > 1
            )
            raise ConfigError(
                f"{asked} is {tp * pp * cp}, which does not divide the {world_size} processes; start a multiple of "
                f"{tp * pp * cp}"
            )
        if self.sequence_parallel and tp == 1:
            raise ConfigError(
                "sequence_parallel=true cuts the sequence over the tensor-parallel devices, of which there is one; "
                "give --tensor-model-parallel-size 2 or more, or leave it out"
            )
        return Layout(
            tp=tp,
            pp=pp,
            dp=world_size // (tp * pp * cp),
            cp=cp,
            sequence_parallel=self.sequence_parallel,
            sharded_optimizer=self.use_distributed_optimizer,
            schedule=self._schedule(),
            layers_per_stage=self.num_layers_per_virtual_pipeline_stage,
            early_reduction=self.foldx_mode is not None,
            zero_stage=self.resolved_zero_stage(),
        )

    def _schedule(self) -> PipelineSchedule:
        if self.foldx_mode:
            return "looped-bfs" if self.foldx_mode == "aiao" else "interleaved"
        several = self.num_layers_per_virtual_pipeline_stage is not None
        return self.pipeline_schedule or ("interleaved" if several else "1f1b")

    def check_model(self, model: ModelConfig) -> None:
        """Raise `ConfigError` when the model cannot be cut this way."""
        pp = self.pipeline_model_parallel_size
        smallest = self.tensor_model_parallel_size * pp * self.context_parallel_size
        stages_of_devices(model.num_layers, self.layout(smallest))
        tp, heads = self.tensor_model_parallel_size, model.num_key_value_heads
        for name in ("num_attention_heads", "ffn_hidden_size"):
            size = getattr(model, name)
            if size % tp:
                raise ConfigError(
                    f"tensor_model_parallel_size={tp} does not divide {name}={size}; {_fitting(model)}"
                )
        if tp % heads and heads % tp:
            raise ConfigError(
                f"tensor_model_parallel_size={tp} neither divides num_key_value_heads={heads} nor is a multiple of it; "
                f"{_fitting(model)}"
            )
        self._check_heads_of_context(model)
        if tp > heads and self.resolved_zero_stage():
            raise ConfigError(
                f"tensor_model_parallel_size={tp} puts each of num_key_value_heads={heads} on several devices, whose "
                "gradients DeepSpeed does not add up; "
                f"choose {', '.join(str(n) for n in divisors(heads))} with ZeRO"
            )

    def _check_heads_of_context(self, model: ModelConfig) -> None:
        """Attention gives each device of cp some of the heads that tensor parallelism left to them all."""
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        queries, keys = model.num_attention_heads // tp, max(model.num_key_value_heads // tp, 1)
        if queries % cp == 0 and (keys % cp == 0 or cp % keys == 0):
            return
        fitting = [n for n in divisors(queries) if keys % n == 0 or n % keys == 0]
        each = f" / tensor_model_parallel_size={tp}" if tp > 1 else ""
        raise ConfigError(
            f"context_parallel_size={cp} does not fit num_attention_heads={model.num_attention_heads} and "
            f"num_key_value_heads={model.num_key_value_heads}{each}: it shares out {queries} query heads, of which it "
            f"must be a divisor, and {keys} key-value heads, of which it must be a divisor or a multiple; choose "
            f"{', '.join(map(str, fitting))}"
        )

    def check_sequence(self, seq_length: int) -> None:
        """Raise `ConfigError` when the sequence cannot be cut."""
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        parts = cp * tp if self.sequence_parallel else cp
        if cp > 1 and seq_length % parts:
            also = (
                f", each of them into tensor_model_parallel_size={tp} (sequence_parallel=true)"
                if parts > cp
                else ""
            )
            raise ConfigError(
                f"context_parallel_size={cp} cuts seq_length={seq_length} into equal parts{also}, which it does not "
                f"divide into; choose {seq_length // parts * parts or parts}"
            )
        if self.sequence_parallel and seq_length % tp:
            raise ConfigError(
                f"sequence_parallel=true cuts seq_length={seq_length} into tensor_model_parallel_size={tp} equal "
                f"parts, which it does not divide into; choose {seq_length // tp * tp or tp}"
            )


@dataclass(frozen=True)
class Layout:
    """Number of devices along each dimension; tp varies fastest with the rank, then cp, dp, pp, as in Megatron-LM.

    Attributes:
        tp: devices that share every layer.
        pp: stages of layers.
        dp: shares of the batch.
        cp: parts of every sequence.
        sequence_parallel: the tp devices cut the sequence between layers.
        sharded_optimizer: the devices that hold the same weights cut the optimizer's state.
        schedule: order of forwards and backwards of the pipeline.
        layers_per_stage: layers of each stage when devices hold several (virtual pipeline); `None` cuts as evenly as
            can be.
        early_reduction: gradients of a stage are added up over its replicas while other stages of the device still
            compute.
        zero_stage: what DeepSpeed cuts over dp: optimizer state (1), gradients (2), weights (3); `None` without it.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    sharded_optimizer: bool = False
    schedule: PipelineSchedule = "1f1b"
    layers_per_stage: int | None = None
    early_reduction: bool = False
    zero_stage: int | None = None

    @property
    def world_size(self) -> int:
        """All devices."""
        return self.tp * self.pp * self.replicas

    @property
    def replicas(self) -> int:
        """Devices that hold the same weights and add up their gradients: dp x cp."""
        return self.dp * self.cp

    def check_micro_batches(self, count: int) -> None:
        """Raise `ConfigError` when the schedule cannot run this number of micro-batches per step and device."""
        if self.schedule in ("interleaved", "interleaved-zb"):
            rounds = max(count // self.pp, 1)
            if count % rounds:
                raise ConfigError(
                    f"{count} micro-batches per step and device do not fill rounds of equal length on "
                    f"pipeline_model_parallel_size={self.pp} devices, which pipeline_schedule={self.schedule} needs; "
                    f"choose sizes that give {count // self.pp * self.pp or 1} or {-(-count // self.pp) * self.pp}"
                )
        if self.schedule == "dualpipev" and count < 2 * self.pp:
            raise ConfigError(
                f"pipeline_schedule=dualpipev needs a micro-batch for each of its {2 * self.pp} stages, not "
                f"{count} per step and device; choose sizes that give more, or another schedule"
            )

    def __str__(self) -> str:
        sizes = f"tp{self.tp} x pp{self.pp} x dp{self.dp}" + f" x cp{self.cp}" * (self.cp > 1)
        pipeline = "" if self.schedule == "1f1b" else f" + {self.schedule}"
        if self.layers_per_stage:
            pipeline += f" of {self.layers_per_stage} layer{'s' * (self.layers_per_stage > 1)}"
        pipeline += " + early reduction" * self.early_reduction
        return (
            sizes
            + pipeline
            + " + sp" * self.sequence_parallel
            + " + sharded optimizer" * self.sharded_optimizer
            + (f" + zero{self.zero_stage}" if self.zero_stage else "")
        )


@dataclass(frozen=True)
class Stage:
    """The part of a model that one pipeline stage holds.

    Attributes:
        index: number of the stage.
        count: stages in all.
        layers: global numbers of its layers.
    """

    index: int
    count: int
    layers: range

    @property
    def is_first(self) -> bool:
        """Whether the embedding is here."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the final norm and the head are here."""
        return self.index == self.count - 1


def stages_of_devices(num_layers: int, layout: Layout) -> list[tuple[Stage, ...]]:
    """Return by pipeline rank the stages that it holds, first ones first.

    One stage a device is the rule. Interleaved schedules deal several out in turn; V schedules two, down and up
    again, so that the first device has the first and the last.

    Raises:
        ConfigError: the layers cannot be cut like that.
    """
    pp, per_stage = layout.pp, layout.layers_per_stage
    if layout.schedule in V_SCHEDULES:
        cut = stages(num_layers, 2 * pp, f"two stages for each of pipeline_model_parallel_size={pp} devices")
        return [(cut[rank], cut[-1 - rank]) for rank in range(pp)]
    if per_stage is None:
        cut = stages(num_layers, pp, f"pipeline_model_parallel_size={pp}")
        return [(stage,) for stage in cut]
    if num_layers % (pp * per_stage):
        fitting = [n for n in divisors(num_layers) if num_layers % (pp * n) == 0]
        choose = f"choose {', '.join(map(str, fitting))}" if fitting else f"{pp} must divide the layers"
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage={per_stage} times pipeline_model_parallel_size={pp} does not "
            f"divide num_layers={num_layers}; {choose}"
        )
    if num_layers == pp * per_stage:
        raise ConfigError(
            f"num_layers_per_virtual_pipeline_stage={per_stage} gives each of {pp} devices one stage only; choose "
            "fewer layers, or leave it out"
        )
    cut = stages(num_layers, num_layers // per_stage, "the virtual pipeline")
    return [tuple(cut[rank::pp]) for rank in range(pp)]


def stages(num_layers: int, count: int, asked_by: str) -> list[Stage]:
    """Cut the layers into stages as equal as can be; the first ones are longer, as the head works in the last.

    Args:
        num_layers: of the model.
        count: of stages.
        asked_by: what asks for this number, for the message.

    Raises:
        ConfigError: a stage would be without a layer.
    """
    if count > num_layers:
        raise ConfigError(
            f"{asked_by} leaves a stage without any of the num_layers={num_layers} layers; "
            f"choose {num_layers} stages or less"
        )
    edges = [-(-num_layers * number // count) for number in range(count + 1)]
    return [Stage(number, count, range(edges[number], edges[number + 1])) for number in range(count)]


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _fitting(model: ModelConfig) -> str:
    heads = model.num_key_value_heads
    fitting = [
        n
        for n in divisors(model.num_attention_heads)
        if model.ffn_hidden_size % n == 0 and (heads % n == 0 or n % heads == 0)
    ]
    return f"choose {', '.join(map(str, fitting))}"
