"""Options of low-rank adaptation."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config, spellings


class LoraConfig(Config):
    """Train small matrices beside the frozen weights (Hu et al., 2021); on when there are targets or an adapter."""

    lora_target_modules: tuple[str, ...] = Field(
        (),
        description="Linear layers that get an adapter: names of AscendSpeed 2023 (query_key_value dense gate_proj "
        "up_proj down_proj), of the model's Hugging Face code, or all-linear.",
    )
    lora_r: int = Field(16, ge=1, description="Rank r of the adapters.")
    lora_alpha: float = Field(32, gt=0, description="The adapter's output is scaled by alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the adapter's input while training.")
    lora_use_rslora: bool = Field(
        False,
        description="Scale by alpha / sqrt(r) (Kalajdzievski, 2023).",
        json_schema_extra=spellings("--use-rslora"),
    )
    lora_modules_to_save: tuple[str, ...] = Field(
        (),
        description="Modules that are trained fully and saved with the adapter: word_embeddings, lm_head.lm_head, "
        "norms; or Hugging Face's names.",
    )
    lora_load: Path | None = Field(
        None,
        description="Start from this adapter, in peft's format or of another run, with its target "
        "modules, rank and alpha.",
    )
    lora_register_forward_hook: tuple[str, ...] = Field(
        (), description="Accepted for old scripts: gradients cross frozen layers and stages without hooks."
    )

    @property
    def is_on(self) -> bool:
        """Whether adapters are trained in place of the weights."""
        return bool(self.lora_target_modules) or self.lora_load is not None

    @model_validator(mode="after")
    def _options_need_targets(self) -> Self:
        given = self.model_fields_set - {"lora_target_modules", "lora_load", "lora_register_forward_hook"}
        if given and not self.is_on:
            raise ValueError(
                f"{', '.join(sorted(given))} means nothing without --lora-target-modules or --lora-load; give one, or "
                "leave it out"
            )
        chosen = given | ({"lora_target_modules"} if self.lora_target_modules else set())
        if self.lora_load is not None and chosen:
            raise ValueError(
                f"{', '.join(sorted(chosen))} and lora_load were both given; an adapter that is loaded keeps its own: "
                "leave the others out"
            )
        return self
