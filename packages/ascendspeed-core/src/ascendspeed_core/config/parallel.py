"""Options of how one model is spread over ranks; no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config, spellings
from ascendspeed_core.config.deepspeed import read_deepspeed_config, stage_of
from ascendspeed_core.config.layout import (
    INTERLEAVED_SCHEDULES,
    Layout,
    PipelineSchedule,
    divisors,
    stages_of_ranks,
)
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_data.errors import ConfigError

FOLD_SCHEDULES = {"aiao": "looped-bfs", "fifo": "interleaved"}
"""Schedules that the fold modes of AscendSpeed 2023 stand for."""


class ParallelConfig(Config):
    """Sizes of the parallel dimensions; the remaining processes are data parallel."""

    tensor_model_parallel_size: int = Field(
        1,
        ge=1,
        description="Tensor parallelism (tp): processes, each on its own device, that split every layer.",
    )
    pipeline_model_parallel_size: int = Field(
        1,
        ge=1,
        description="Pipeline parallelism (pp): stages that the layers are split into; they need not be equally long.",
    )
    context_parallel_size: int = Field(
        1,
        ge=1,
        description="Context parallelism (cp): processes that split every sequence; each computes a part of its "
        "tokens, and in attention a part of its heads.",
    )
    expert_model_parallel_size: int = Field(
        1,
        ge=1,
        description="Expert parallelism (ep): processes that share out the experts of each layer; tokens are sent to "
        "them and back. They are among those of dp, cp and tp.",
    )
    expert_tensor_parallel_size: int | None = Field(
        None,
        ge=1,
        description="Processes that split every expert (etp). [default: --tensor-model-parallel-size]",
    )
    sequence_parallel: bool = Field(
        False,
        description="Split activations of norms and residuals along the sequence: less memory. Needs tp > 1.",
    )
    use_distributed_optimizer: bool = Field(
        False,
        description="Shard optimizer state and master weights over the processes with the same weights, dp x cp "
        "(ZeRO-1).",
    )
    overlap_grad_reduce: bool = Field(
        True,
        description="Add gradients up over the processes with the same weights while the last backward of a step still "
        "computes; the numbers are the same without.",
    )
    overlap_param_gather: bool = Field(
        True,
        description="With --use-distributed-optimizer gather the new weights while the next forward computes; each "
        "layer waits for its own.",
    )
    ddp_bucket_size: int = Field(
        1 << 24, ge=1, description="Gradients and weights that travel in one message, counted in numbers."
    )
    zero_stage: Literal[1, 2, 3] | None = Field(
        None,
        description="Train with DeepSpeed, which shards over the data-parallel processes the optimizer's state (1), "
        "also the gradients (2), also the weights (3). Needs ascendspeed-core[deepspeed].",
    )
    deepspeed: bool = Field(
        False,
        description="Train with DeepSpeed, configured by --deepspeed_config or --zero-stage.",
        json_schema_extra={"off": ""},
    )
    deepspeed_config: Path | None = Field(
        None,
        description='DeepSpeed\'s JSON file. Values set in both places must match, or be "auto" in the file.',
        json_schema_extra=spellings("--deepspeed_config"),
    )
    engine: Literal["ascendspeed", "deepspeed", "megatron"] | None = Field(
        None,
        description="Who computes and applies gradients: this project's engine; DeepSpeed, with --zero-stage; or "
        "megatron-core, on GPUs and NPUs. [default: deepspeed where it is asked for, else ascendspeed]",
    )
    megatron_args: Path | None = Field(
        None,
        description="With --engine megatron: JSON file with further fields of its configs, "
        '{"TransformerConfig": {...}, "OptimizerConfig": {...}, "DistributedDataParallelConfig": {...}}.',
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(
        None,
        description="With --engine megatron: multiply in FP8, by Transformer Engine's linear layers; hybrid takes e4m3 "
        "forward and e5m2 backward. Not run yet. [default: the format of the weights]",
        json_schema_extra=spellings("--fp8-format"),
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = Field(
        None, description="How --fp8 scales: by megatron-core's names. [default: delayed]"
    )
    num_layers_per_virtual_pipeline_stage: int | None = Field(
        None,
        ge=1,
        description="Layers of each stage, if each process holds several stages (virtual pipeline): less "
        "idle time, more communication.",
    )
    pipeline_schedule: PipelineSchedule | None = Field(
        None,
        description="Order of forward and backward passes. [default: 1f1b; interleaved if processes hold several "
        "stages]",
    )
    foldx_mode: Literal["aiao", "fifo"] | None = Field(
        None,
        description="Sum a stage's gradients over the data-parallel processes while other stages still compute: aiao "
        "runs looped-bfs, fifo runs interleaved. Needs --num-layers-per-virtual-pipeline-stage.",
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
                f"pipeline_schedule={schedule} needs several stages for each rank; give "
                "--num-layers-per-virtual-pipeline-stage N"
            )
        return self

    @property
    def chosen_engine(self) -> Literal["ascendspeed", "deepspeed", "megatron"]:
        """Who computes and applies gradients."""
        return self.engine or ("deepspeed" if self.deepspeed or self.zero_stage else "ascendspeed")

    @model_validator(mode="after")
    def _engine_fits(self) -> "ParallelConfig":
        asks_zero = self.deepspeed or self.zero_stage is not None
        if self.engine == "deepspeed" and not asks_zero:
            raise ValueError("engine=deepspeed needs a stage; give --zero-stage 1, 2 or 3")
        if self.engine not in (None, "deepspeed") and asks_zero:
            asked = f"zero_stage={self.zero_stage}" if self.zero_stage else "deepspeed=true"
            raise ValueError(f"engine={self.engine} and {asked} name two engines; leave one of them out")
        if self.megatron_args is not None and self.engine != "megatron":
            raise ValueError(
                f"megatron_args={self.megatron_args} means nothing without --engine megatron; give it too"
            )
        if self.fp8 is not None and self.engine != "megatron":
            raise ValueError(f"fp8={self.fp8} needs --engine megatron, which has such layers; give it too")
        if self.fp8_recipe is not None and self.fp8 is None:
            raise ValueError(f"fp8_recipe={self.fp8_recipe} means nothing without --fp8; give it too")
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
                "tensor-parallel ranks before DeepSpeed cuts them; leave one of them out"
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
        """Return the layout of `world_size` processes.

        Raises:
            ConfigError: tp times pp does not divide the number of processes, or a flag needs more of them.
            AscendSpeedError: DeepSpeed's JSON cannot be read.
        """
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        cp = self.context_parallel_size
        if pp == cp == 1 and world_size % tp:
            raise ConfigError(
                f"tensor_model_parallel_size={tp} does not divide the {_processes(world_size)}; "
                f"{_start(tp, world_size, divisors(world_size))}"
            )
        if world_size % (tp * pp * cp):
            sizes = {"tensor_model": tp, "context": cp, "pipeline_model": pp}
            asked = " times ".join(
                f"{name}_parallel_size={size}" for name, size in sizes.items() if name != "context" or cp > 1
            )
            raise ConfigError(
                f"{asked} is {tp * pp * cp}, which does not divide the {_processes(world_size)}; "
                f"{_start(tp * pp * cp, world_size)}"
            )
        if self.sequence_parallel and tp == 1:
            raise ConfigError(
                "sequence_parallel=true splits the sequence over the tensor-parallel ranks, of which there is one; "
                "give --tensor-model-parallel-size 2 or more, or leave it out"
            )
        layout = Layout(
            tp=tp,
            pp=pp,
            dp=world_size // (tp * pp * cp),
            cp=cp,
            sequence_parallel=self.sequence_parallel,
            sharded_optimizer=self.use_distributed_optimizer,
            schedule=self._schedule(),
            layers_per_stage=self.num_layers_per_virtual_pipeline_stage,
            early_reduction=self.foldx_mode is not None,
            overlap_grad_reduce=self.overlap_grad_reduce,
            overlap_param_gather=self.overlap_param_gather,
            bucket_elements=self.ddp_bucket_size,
            zero_stage=self.resolved_zero_stage(),
            ep=self.expert_model_parallel_size,
            etp=self.expert_tensor_parallel_size,
        )
        # Names the sizes that do not fit together.
        assert layout.axes
        return layout

    def _schedule(self) -> PipelineSchedule:
        if self.foldx_mode:
            return "looped-bfs" if self.foldx_mode == "aiao" else "interleaved"
        several = self.num_layers_per_virtual_pipeline_stage is not None
        return self.pipeline_schedule or ("interleaved" if several else "1f1b")

    def check_model(self, model: ModelConfig) -> None:
        """Raise `ConfigError` when the model cannot be cut this way."""
        pp = self.pipeline_model_parallel_size
        smallest = self.tensor_model_parallel_size * pp * self.context_parallel_size
        plain = self.model_copy(update={"expert_model_parallel_size": 1, "expert_tensor_parallel_size": None})
        stages_of_ranks(model.num_layers, plain.layout(smallest))
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
        self._check_experts(model)
        if tp > heads and self.resolved_zero_stage():
            raise ConfigError(
                f"tensor_model_parallel_size={tp} puts each of num_key_value_heads={heads} on several ranks, whose "
                "gradients DeepSpeed does not add up; "
                f"choose {', '.join(str(n) for n in divisors(heads))} with ZeRO"
            )

    def _check_experts(self, model: ModelConfig) -> None:
        """Check that the experts can be shared out, and are there."""
        ep, etp = self.expert_model_parallel_size, self.expert_tensor_parallel_size
        if model.experts is None:
            if ep > 1 or etp is not None:
                given = f"expert_model_parallel_size={ep}" if ep > 1 else f"expert_tensor_parallel_size={etp}"
                raise ConfigError(f"{given} was given for a model without experts; leave it out")
            return
        if self.deepspeed or self.resolved_zero_stage():
            raise ConfigError(
                f"zero_stage={self.resolved_zero_stage()} for a model with experts: DeepSpeed would divide the state "
                "of experts over ranks that hold other ones; use --use-distributed-optimizer"
            )
        if model.experts.count % ep:
            raise ConfigError(
                f"expert_model_parallel_size={ep} does not divide the {model.experts.count} experts of a layer; "
                f"choose {', '.join(map(str, divisors(model.experts.count)))}"
            )
        parts = self.tensor_model_parallel_size if etp is None else etp
        if model.experts.ffn_hidden_size % parts:
            raise ConfigError(
                f"expert_tensor_parallel_size={parts} does not divide the experts' width of "
                f"{model.experts.ffn_hidden_size}; choose a divisor"
            )
        tp, shared = self.tensor_model_parallel_size, model.experts.shared_ffn_hidden_size
        if shared is not None and shared % tp:
            raise ConfigError(
                f"tensor_model_parallel_size={tp} does not divide the shared expert's width of {shared}; choose a "
                "divisor"
            )

    def _check_heads_of_context(self, model: ModelConfig) -> None:
        """Check that the ranks of cp can share the heads that tensor parallelism leaves to them."""
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


def _processes(count: int) -> str:
    return f"{count} processes" if count > 1 else "one process"


def _start(wanted: int, world_size: int, sizes: Sequence[int] = ()) -> str:
    """Say how to start as many processes as a layout needs."""
    if world_size == 1:
        return f"start {wanted} with --nproc-per-node {wanted} (or torchrun)"
    smaller = f"choose one of {', '.join(map(str, sizes))} or " if sizes else ""
    return f"{smaller}start a multiple of {wanted} (--nproc-per-node, or torchrun)"


def _fitting(model: ModelConfig) -> str:
    heads = model.num_key_value_heads
    fitting = [
        n
        for n in divisors(model.num_attention_heads)
        if model.ffn_hidden_size % n == 0 and (heads % n == 0 or n % heads == 0)
    ]
    return f"choose {', '.join(map(str, fitting))}"
