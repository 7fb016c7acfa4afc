"""The model that a command works on."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config, spellings


class ModelSourceConfig(Config):
    """Weights come from a checkpoint, or from a seed when that is asked for by name; never by accident."""

    load: Path | None = Field(
        None,
        description="Start from this checkpoint: a run's folder, a Hugging Face folder, or one of AscendSpeed 2023, "
        "Megatron-LM (mp_rank or torch_dist) or DeepSpeed; or a name on the Hugging Face hub, org/name@revision.",
    )
    model_config_file: Path | None = Field(
        None,
        description="Start from random weights of this Hugging Face config.json, or of a published size by its name "
        "(llama2-7b; `asd-core models` lists them). With --load: the architecture of a checkpoint of AscendSpeed 2023, "
        "Megatron-LM or DeepSpeed that does not say it.",
        json_schema_extra=spellings("--model-config"),
    )
    orig_vocab_size: int | None = Field(
        None,
        ge=1,
        description="With --load: vocabulary size without padding, for checkpoints that do not record it.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.load is None and self.model_config_file is None:
            raise ValueError(
                "neither of --load and --model-config given; give --load DIR to start from weights, or "
                "--model-config FILE to start from random ones (a config.json, or a size that `asd-core models` "
                "lists; --num-layers and the other sizes only check the model)"
            )
        if self.load is None and self.orig_vocab_size is not None:
            raise ValueError(
                f"orig_vocab_size={self.orig_vocab_size} speaks of a checkpoint, but no --load was given; leave "
                "--orig-vocab-size out"
            )
        return self
