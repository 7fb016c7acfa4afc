"""Options of activation recompute: less memory, more time."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.layout import SPLIT_BACKWARD_SCHEDULES, PipelineSchedule
from ascendspeed_data.errors import ConfigError


class RecomputeConfig(Config):
    """Which activations are dropped after the forward pass and recomputed in the backward pass."""

    checkpoint_activations: bool = Field(
        False,
        description="Recompute activations in the backward pass instead of keeping them: less memory, more time.",
    )
    checkpoint_policy: Literal["full", "block", "custom", "selective", "attention", "auto"] = Field(
        "full",
        description="What is recomputed; given alone it means --checkpoint-activations too. full: all layers; block: "
        "the first --checkpoint-block-layer of each stage; custom: as --recomputation-layer-num says; selective: in "
        "all layers everything but matrix products and attention; attention: the attention of all layers; auto: as "
        "little as --memory-budget-gib allows.",
    )
    memory_budget_gib: float | None = Field(
        None,
        gt=0,
        description="For policy auto: memory that the tensors of a step may use on each device, in GiB. [default: 90 % "
        "of the accelerator's memory]",
    )
    checkpoint_block_layer: int = Field(
        25, ge=1, description="Layers of each stage that policy block recomputes."
    )
    recomputation_layer_num: tuple[int, ...] = Field(
        (), description="For policy custom: layers to recompute in each pipeline stage, 3 2 1 0."
    )

    @model_validator(mode="after")
    def _policy_means_recompute(self) -> "RecomputeConfig":
        given = self.model_fields_set
        if "checkpoint_policy" in given and "checkpoint_activations" not in given:
            # It stays a field that was not given: `note` tells the two apart.
            object.__setattr__(self, "checkpoint_activations", True)
        return self

    @model_validator(mode="after")
    def _options_belong_together(self) -> "RecomputeConfig":
        others = ", ".join(sorted(self.model_fields_set - {"checkpoint_activations"}))
        if not self.checkpoint_activations and others:
            if "checkpoint_activations" in self.model_fields_set:
                raise ValueError(
                    f"{others} means nothing with checkpoint_activations=false; leave one of them out"
                )
            raise ValueError(
                f"{others} means nothing without --checkpoint-activations or --checkpoint-policy; give one too"
            )
        if "checkpoint_block_layer" in self.model_fields_set and self.checkpoint_policy != "block":
            raise ValueError(
                f"checkpoint_block_layer={self.checkpoint_block_layer} means nothing with "
                f"checkpoint_policy={self.checkpoint_policy}; give --checkpoint-policy block, or leave it out"
            )
        if (self.checkpoint_policy == "custom") != bool(self.recomputation_layer_num):
            raise ValueError(
                "checkpoint_policy=custom and recomputation_layer_num go together; give both or neither"
            )
        if self.memory_budget_gib is not None and not self.is_fitted:
            raise ValueError(
                f"memory_budget_gib={self.memory_budget_gib} means nothing with "
                f"checkpoint_policy={self.checkpoint_policy}; give --checkpoint-policy auto, or leave it out"
            )
        if any(count < 0 for count in self.recomputation_layer_num):
            raise ValueError(f"recomputation_layer_num={self.recomputation_layer_num}: 0 is the least")
        return self

    @property
    def note(self) -> str | None:
        """A line for the log where `checkpoint_policy` alone means recompute, as in the README of 2023."""
        if not self.checkpoint_activations or "checkpoint_activations" in self.model_fields_set:
            return None
        policy = self.checkpoint_policy
        return f"recompute: policy {policy} (--checkpoint-policy alone means --checkpoint-activations too)"

    @property
    def is_fitted(self) -> bool:
        """Whether what is recomputed is chosen by measuring."""
        return self.checkpoint_activations and self.checkpoint_policy == "auto"

    def check_pipeline(self, schedule: PipelineSchedule, layers_by_device: Sequence[int]) -> None:
        """Check the policy against a pipeline.

        Args:
            schedule: order of forwards and backwards.
            layers_by_device: layers of all stages of each pipeline rank.

        Raises:
            ConfigError: `selective` or `auto` under a schedule that goes back through a layer twice; `custom` without
                a number for each device, or with one above its layers.
        """
        selective = self.checkpoint_activations and self.checkpoint_policy == "selective"
        if selective and schedule in SPLIT_BACKWARD_SCHEDULES:
            raise ConfigError(
                f"checkpoint_policy=selective keeps what it keeps for one backward pass, pipeline_schedule={schedule} "
                "takes two, of inputs and of weights; choose another policy or schedule"
            )
        if self.is_fitted and schedule in SPLIT_BACKWARD_SCHEDULES:
            raise ConfigError(
                f"checkpoint_policy=auto counts what one backward pass needs, pipeline_schedule={schedule} takes two, "
                "of inputs and of weights; choose another policy or schedule"
            )
        counts = self.recomputation_layer_num
        if counts and len(counts) != len(layers_by_device):
            raise ConfigError(
                f"recomputation_layer_num has {len(counts)} numbers for {len(layers_by_device)} pipeline stages; give "
                "one for each"
            )
        for stage, (count, layers) in enumerate(zip(counts, layers_by_device, strict=False)):
            if count > layers:
                raise ConfigError(
                    f"recomputation_layer_num asks for {count} layers in pipeline stage {stage}, which has {layers}; "
                    f"choose {layers} or less"
                )


Mode = Literal["none", "selective", "full"]
"""What of a layer is computed again: nothing; everything but matrix products and attention; everything."""
