"""Options of `asd-ckpt convert` and `merge-lora`: one definition for flags, help and checks.

The flags of the 2023 scripts (`convert_weights_from_huggingface.py`, `convert_weights_when_tp_pp_change.py`) keep their
names. Those that described what the file itself tells are compared with it.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config, spellings

SourceKind = Literal["native", "huggingface", "ascendspeed", "megatron", "torch_dist", "deepspeed"]
TargetKind = Literal["native", "huggingface", "ascendspeed", "megatron", "torch_dist"]
FOREIGN = ("ascendspeed", "megatron", "torch_dist")
SHARDED = ("ascendspeed", "megatron")


class InputOptions(Config):
    """What to read."""

    input_model_dir: Path = Field(
        description="Checkpoint to read; its kind is recognised.", json_schema_extra=spellings("--load")
    )
    from_kind: SourceKind | None = Field(
        None, description="What the input is. [default: recognised]", json_schema_extra=spellings("--from")
    )
    model_config_file: Path | None = Field(
        None,
        description="config.json of the model, for checkpoints of other systems that do not say what they are.",
        json_schema_extra=spellings("--model-config"),
    )
    orig_vocab_size: int | None = Field(
        None, ge=1, description="Rows of the embedding that are not filling, where the input does not say it."
    )
    type: str | None = Field(
        None,
        description="Size of the model by the names of the 2023 scripts, such as 7B or 65B; must fit the input, and "
        "says what it is where a checkpoint of 2023 does not.",
    )
    bias: bool = Field(
        False,
        description="The model has biases in attention (InternLM); must fit.",
        json_schema_extra={"off": ""},
    )
    pse: bool = Field(
        False,
        description="The model has ALiBi positions (Baichuan-13B); must fit.",
        json_schema_extra={"off": ""},
    )
    src_tensor_model_parallel_size: int | None = Field(
        None, ge=1, description="Tensor-parallel ranks of the input; must fit."
    )
    src_pipeline_model_parallel_size: int | None = Field(
        None, ge=1, description="Pipeline stages of the input; must fit."
    )


class OutputOptions(Config):
    """What to write."""

    output_model_dir: Path = Field(description="Folder to write.", json_schema_extra=spellings("--save"))
    to: TargetKind | None = Field(
        None,
        description="Kind to write. [default: ascendspeed if a layout is given, else native from huggingface and "
        "huggingface from all others]",
    )
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = Field(
        None, description="Format of the written weights. [default: as stored]"
    )
    tokenizer_name_or_path: Path | None = Field(
        None, description="Tokenizer that goes along. [default: the input's own]"
    )
    max_shard_size: str = Field("5GB", description="Weights in one Hugging Face file, such as 500MB or 5GB.")
    weights_format: Literal["safetensors", "bin"] = Field(
        "safetensors", description="Files of a Hugging Face folder."
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
    num_layers_per_virtual_pipeline_stage: int | None = Field(
        None, ge=1, description="Layers of each chunk of a virtual pipeline. [default: no virtual pipeline]"
    )
    partition_layers: str | None = Field(
        None, description="Layers of each stage, such as 6,6,5. [default: as equal as can be]"
    )
    make_vocab_size_divisible_by: int = Field(
        128, ge=1, description="Embedding and head are filled up to a multiple of this times tp."
    )
    merge_mlp: bool = Field(
        False,
        description="Gate and up in one tensor, as AscendSpeed's --mlp-layer-fusion wants them.",
        json_schema_extra={"off": ""},
    )
    megatron_layers: Literal["transformer_engine", "local"] = Field(
        "transformer_engine", description="Names of Megatron-LM's --transformer-impl."
    )
    deepspeed: bool = Field(
        False,
        description="Refused: DeepSpeed's files are read, not written; trainers load the other kinds.",
        json_schema_extra={"off": ""},
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.deepspeed:
            raise ValueError(
                "deepspeed=true is not supported: DeepSpeed's layout is read, not written; choose another --to"
            )
        given = [
            name
            for name in (
                "tensor_model_parallel_size",
                "pipeline_model_parallel_size",
                "num_layers_per_virtual_pipeline_stage",
                "partition_layers",
            )
            if getattr(self, name) is not None
        ]
        if given and self.to is not None and self.to not in FOREIGN:
            raise ValueError(
                f"{given[0]}={getattr(self, given[0])} means nothing for --to {self.to}, which any layout can load; "
                "leave it out"
            )
        if self.merge_mlp and self.to not in (None, "ascendspeed"):
            raise ValueError(f"merge_mlp=true is of --to ascendspeed, not {self.to}; leave it out")
        self.stage_sizes()
        return self

    @property
    def has_layout(self) -> bool:
        """Whether the output was asked to be cut."""
        return self.tensor_model_parallel_size is not None or self.pipeline_model_parallel_size is not None

    def stage_sizes(self) -> tuple[int, ...] | None:
        """Return `partition_layers` as numbers.

        Raises:
            ValueError: it is no list of numbers.
        """
        if self.partition_layers is None:
            return None
        parts = self.partition_layers.split(",")
        if not all(part.strip().isdecimal() for part in parts):
            raise ValueError(
                f"partition_layers={self.partition_layers!r} is no list of numbers; write for example 6,6,5"
            )
        return tuple(int(part) for part in parts)


class ChangeOptions(Config):
    """How the model changes on the way."""

    resize_vocab_to: Path | None = Field(
        None,
        description="Tokenizer folder: the embedding grows or shrinks to its size. New rows are the mean of all old "
        "ones.",
    )
    added_token_num: int = Field(
        0,
        ge=0,
        description="Ids added at the end of the vocabulary; their rows are the mean of all old ones.",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.resize_vocab_to is not None and self.added_token_num:
            raise ValueError("resize_vocab_to and added_token_num exclude each other; give one of them")
        return self


class WorkOptions(Config):
    """How to go about it."""

    verify_logits: bool | None = Field(
        None, description="Run the input and the output on the CPU. [default: below a billion parameters]"
    )
    workers: int | None = Field(
        None, ge=1, description="Files written at once. [default: one per core, at most 8]"
    )
    overwrite: bool = Field(False, description="Replace a folder that exists.", json_schema_extra={"off": ""})


class ConvertOptions(Config):
    """Everything `asd-ckpt convert` takes."""

    input: InputOptions
    output: OutputOptions
    change: ChangeOptions = ChangeOptions()
    work: WorkOptions = WorkOptions()
