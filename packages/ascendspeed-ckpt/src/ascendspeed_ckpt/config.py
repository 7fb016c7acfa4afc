"""Options of `asd-ckpt convert` and `merge-lora`: one definition for flags, help and checks.

The flags of the 2023 scripts (`convert_weights_from_huggingface.py`, `convert_weights_when_tp_pp_change.py`) keep their
names. Flags that describe the input are compared with it.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config, spellings

SourceKind = Literal["native", "huggingface", "ascendspeed", "megatron", "torch_dist", "deepspeed"]
TargetKind = Literal["native", "huggingface", "ascendspeed", "megatron", "torch_dist"]
EXTERNAL_KINDS = ("ascendspeed", "megatron", "torch_dist")
MP_RANK_KINDS = ("ascendspeed", "megatron")


class InputOptions(Config):
    """What to read."""

    input_model_dir: Path = Field(
        description="Checkpoint folder to read, of any kind.", json_schema_extra=spellings("--load")
    )
    from_kind: SourceKind | None = Field(
        None, description="Kind of the input. [default: detected]", json_schema_extra=spellings("--from")
    )
    model_config_file: Path | None = Field(
        None,
        description="config.json of the model, for external checkpoints that do not include one.",
        json_schema_extra=spellings("--model-config"),
    )
    orig_vocab_size: int | None = Field(
        None, ge=1, description="Vocabulary size without padding, for inputs that do not record it."
    )
    type: str | None = Field(
        None,
        description="Size of the model as the 2023 scripts name it, such as 7B or 65B. Must match the input; also "
        "gives the architecture of a 2023 checkpoint that does not include it.",
    )
    bias: bool = Field(
        False,
        description="The model has biases in attention (InternLM); must match the input.",
        json_schema_extra={"off": ""},
    )
    pse: bool = Field(
        False,
        description="The model has ALiBi positions (Baichuan-13B); must match the input.",
        json_schema_extra={"off": ""},
    )
    src_tensor_model_parallel_size: int | None = Field(
        None, ge=1, description="Tensor-parallel ranks of the input; must match it."
    )
    src_pipeline_model_parallel_size: int | None = Field(
        None, ge=1, description="Pipeline stages of the input; must match it."
    )


class OutputOptions(Config):
    """What to write."""

    output_model_dir: Path = Field(
        description="Checkpoint folder to write.", json_schema_extra=spellings("--save")
    )
    to: TargetKind | None = Field(
        None,
        description="Kind to write. [default: merge-lora: the kind of the input; convert: ascendspeed if a layout is "
        "given, else native from huggingface and huggingface from all others]",
    )
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = Field(
        None, description="Dtype of the written weights. [default: as stored]"
    )
    tokenizer_name_or_path: Path | None = Field(
        None, description="Folder of the tokenizer to copy. [default: the input's own]"
    )
    max_shard_size: str = Field(
        "5GB", description="Largest weight file of a Hugging Face folder, such as 500MB or 5GB."
    )
    weights_format: Literal["safetensors", "bin"] = Field(
        "safetensors", description="File format of weights in a Hugging Face folder."
    )
    tensor_model_parallel_size: int | None = Field(
        None,
        ge=1,
        description="Tensor-parallel ranks of the output. [default: 1]",
        json_schema_extra=spellings("--tgt-tensor-model-parallel-size"),
    )
    pipeline_model_parallel_size: int | None = Field(
        None,
        ge=1,
        description="Pipeline stages of the output. [default: 1]",
        json_schema_extra=spellings("--tgt-pipeline-model-parallel-size"),
    )
    expert_model_parallel_size: int | None = Field(
        None,
        ge=1,
        description="Ranks of the output over which the experts of a layer are spread. [default: 1]",
        json_schema_extra=spellings("--target-expert-parallel-size"),
    )
    num_layers_per_virtual_pipeline_stage: int | None = Field(
        None,
        ge=1,
        description="Layers of each chunk under a virtual pipeline. [default: no virtual pipeline]",
    )
    partition_layers: str | None = Field(
        None, description="Layers of each pipeline stage, such as 6,6,5. [default: as equal as possible]"
    )
    make_vocab_size_divisible_by: int = Field(
        128,
        ge=1,
        description="Pad embedding and head to a multiple of this number times the tensor-parallel size.",
    )
    merge_mlp: bool = Field(
        False,
        description="Store gate and up projections as one tensor, as AscendSpeed's --mlp-layer-fusion expects.",
        json_schema_extra={"off": ""},
    )
    megatron_layers: Literal["transformer_engine", "local"] = Field(
        "transformer_engine",
        description="Tensor names to write: those of this --transformer-impl of Megatron-LM.",
    )
    deepspeed: bool = Field(
        False,
        description="Refused: DeepSpeed checkpoints can be read but not written.",
        json_schema_extra={"off": ""},
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.deepspeed:
            raise ValueError(
                "deepspeed=true is not supported: DeepSpeed checkpoints can be read but not written; choose "
                "another --to"
            )
        given = [
            name
            for name in (
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "expert_model_parallel_size",
                "num_layers_per_virtual_pipeline_stage",
                "partition_layers",
            )
            if getattr(self, name) is not None
        ]
        if given and self.to is not None and self.to not in EXTERNAL_KINDS:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])} does not apply to --to {self.to}, which every layout can load; "
                "leave it out"
            )
        if self.merge_mlp and self.to not in (None, "ascendspeed"):
            raise ValueError(f"merge_mlp=true applies to --to ascendspeed, not to {self.to}; leave it out")
        self.stage_sizes()
        return self

    @property
    def has_layout(self) -> bool:
        """Whether a tensor- or pipeline-parallel layout was given."""
        return self.tensor_model_parallel_size is not None or self.pipeline_model_parallel_size is not None

    def stage_sizes(self) -> tuple[int, ...] | None:
        """Return `partition_layers` as numbers.

        Raises:
            ValueError: it is not a list of numbers.
        """
        if self.partition_layers is None:
            return None
        parts = self.partition_layers.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ValueError(
                f"partition_layers={self.partition_layers!r} is not a list of numbers; write for example 6,6,5"
            )
        return tuple(int(part) for part in parts)


class ChangeOptions(Config):
    """How the model is changed."""

    resize_vocab_to: Path | None = Field(
        None,
        description="Tokenizer folder: embedding and head are resized to its vocabulary. New rows are the mean of "
        "all old rows.",
    )
    added_token_num: int = Field(
        0,
        ge=0,
        description="Number of ids to add at the end of the vocabulary; their rows are the mean of all old rows.",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.resize_vocab_to is not None and self.added_token_num:
            raise ValueError("resize_vocab_to and added_token_num exclude each other; give one of them")
        return self


class WorkOptions(Config):
    """How the work is done."""

    verify_logits: bool | None = Field(
        None,
        description="Compare the logits of input and output on the CPU. [default: below a billion parameters]",
    )
    workers: int | None = Field(
        None, ge=1, description="Files written at once. [default: one per core, at most 8]"
    )
    overwrite: bool = Field(
        False, description="Replace the output folder if it exists.", json_schema_extra={"off": ""}
    )


class ConvertOptions(Config):
    """Everything `asd-ckpt convert` takes."""

    input: InputOptions
    output: OutputOptions
    change: ChangeOptions = ChangeOptions()
    work: WorkOptions = WorkOptions()
