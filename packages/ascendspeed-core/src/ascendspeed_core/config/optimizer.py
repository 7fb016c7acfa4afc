"""Options of the optimizer, its schedule and gradient clipping."""

from typing import Literal

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.compute import ComputeConfig as ComputeConfig
from ascendspeed_core.config.recompute import RecomputeConfig as RecomputeConfig
from ascendspeed_data.errors import ConfigError


class OptimizerConfig(Config):
    """How gradients change weights: update rule, learning-rate schedule, gradient clipping."""

    optimizer: Literal["adam", "fused_adam", "sgd"] = Field(
        "adam",
        description="adam: AdamW, with the device's kernel that needs least memory; fused_adam: the same with the "
        "fastest one; sgd: with momentum.",
    )
    lr: float = Field(3e-4, gt=0, description="Peak learning rate.")
    min_lr: float = Field(0.0, ge=0, description="Lowest learning rate.")
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = Field(
        "linear", description="Shape of the learning-rate decay."
    )
    lr_decay_iters: int | None = Field(None, ge=1, description="Steps of the decay. [default: --train-iters]")
    lr_decay_samples: int | None = Field(
        None, ge=1, description="Samples of the decay, with --train-samples. [default: --train-samples]"
    )
    lr_warmup_samples: int = Field(0, ge=0, description="Samples of linear warm-up, with --train-samples.")
    lr_warmup_iters: int = Field(0, ge=0, description="Steps of linear warm-up.")
    lr_warmup_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Length of the warm-up as a fraction of the decay (0.01), instead of a number of steps.",
    )
    weight_decay: float = Field(
        0.01, ge=0, description="Weight decay; applies to matrices, not to norms and biases."
    )
    adam_beta1: float = Field(
        0.9, ge=0, lt=1, description="Decay rate of the first moment (mean of gradients)."
    )
    adam_beta2: float = Field(
        0.999, ge=0, lt=1, description="Decay rate of the second moment (mean of squared gradients)."
    )
    adam_eps: float = Field(1e-8, gt=0, description="Added to the square root of the second moment.")
    sgd_momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of sgd.")
    clip_grad: float = Field(
        1.0, ge=0, description="Clip gradients to this global norm; 0 turns clipping off."
    )

    @model_validator(mode="after")
    def _rates_in_order(self) -> "OptimizerConfig":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr} is above lr={self.lr}; choose a smaller one")
        if self.lr_warmup_iters and self.lr_warmup_fraction is not None:
            raise ValueError("lr_warmup_iters and lr_warmup_fraction were both given; give one")
        if self.lr_warmup_samples and self.lr_warmup_fraction is not None:
            raise ValueError("lr_warmup_samples and lr_warmup_fraction were both given; give one")
        return self

    def check_unit(self, in_samples: bool) -> None:
        """Raise `ConfigError` when the run's length is in samples and its schedule in steps, or the other way."""
        other = (
            ("lr_decay_iters", "lr_warmup_iters") if in_samples else ("lr_decay_samples", "lr_warmup_samples")
        )
        given = [name for name in other if getattr(self, name)]
        if given:
            length = "train_samples" if in_samples else "train_iters"
            unit = "samples" if in_samples else "iters"
            raise ConfigError(
                f"{given[0]} was given with {length}; give --{given[0].rpartition('_')[0].replace('_', '-')}-{unit}"
            )

    @model_validator(mode="after")
    def _options_of_the_rule(self) -> "OptimizerConfig":
        other = "adam_" if self.optimizer == "sgd" else "sgd_"
        unused = sorted(name for name in self.model_fields_set if name.startswith(other))
        if unused:
            raise ValueError(
                f"{', '.join(unused)} means nothing with optimizer={self.optimizer}; leave it out"
            )
        return self
