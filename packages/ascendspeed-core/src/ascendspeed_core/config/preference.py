"""Options of preference tuning: those of pre-training, the loss of a pair, and the reference."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.finetune import PaddedDataConfig, TuneConfig
from ascendspeed_core.config.records import RecordsConfig


class PreferenceDataConfig(PaddedDataConfig):
    """Which pairs are trained on."""

    @model_validator(mode="after")
    def _labels_say_what_is_learned(self) -> Self:
        self.refuse_document_options("the labels of a pair say what is compared")
        return self


class PreferenceConfig(Config):
    """The loss of a pair."""

    dpo_beta: float = Field(
        0.1,
        gt=0,
        description="How close the model stays to the reference: the smaller, the further it may go.",
    )
    dpo_loss: Literal["sigmoid", "ipo", "hinge"] = Field(
        "sigmoid",
        description="sigmoid: DPO; ipo: a square around 1/(2 beta), of mean log-probabilities; hinge: that of SLiC.",
    )
    dpo_label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Share of pairs assumed to be labelled the wrong way round; sigmoid only.",
    )
    dpo_sft_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the chosen answer's own loss, a mean over its tokens, beside the pair's.",
    )
    reference: Path | None = Field(
        None,
        description="Reference checkpoint, which is never trained. [default: --load; of a run that goes on, the "
        "one it began with]",
    )

    @model_validator(mode="after")
    def _smoothing_is_of_sigmoid(self) -> Self:
        if self.dpo_label_smoothing and self.dpo_loss != "sigmoid":
            raise ValueError(
                f"dpo_label_smoothing={self.dpo_label_smoothing} has no meaning for dpo_loss={self.dpo_loss}; leave it "
                "out, or choose sigmoid"
            )
        return self


class DpoConfig(TuneConfig):
    """Everything `asd-core dpo` takes; the sections of a TOML recipe."""

    data: PreferenceDataConfig
    records: RecordsConfig = RecordsConfig()
    preference: PreferenceConfig = PreferenceConfig()

    @property
    def objective(self) -> str:
        """Name of what the run trains for, see `objectives.registry`."""
        return "dpo"

    @model_validator(mode="after")
    def _starts_from_a_trained_model(self) -> Self:
        if self.start.load is None:
            raise ValueError("model_config_file gives random weights, which prefer nothing; give --load DIR")
        if self.parallel.resolved_zero_stage() is not None:
            raise ValueError(
                "zero_stage and deepspeed do not go with preference tuning, whose reference DeepSpeed would not cut; "
                "give --use-distributed-optimizer, which cuts the optimizer's state, or --lora-target-modules"
            )
        if self.recompute.is_fitted:
            raise ValueError(
                "checkpoint_policy=auto measures the loss of tokens, not of pairs; choose another policy for dpo"
            )
        if self.batch.finds_sizes:
            raise ValueError(
                "manual_mbs=auto measures single samples, not pairs; write the sizes out, or leave it out"
            )
        return self
