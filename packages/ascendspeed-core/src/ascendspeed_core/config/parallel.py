"""How one model is spread over devices; pure arithmetic, no torch."""

from dataclasses import dataclass
from typing import Self

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_data.errors import ConfigError


class ParallelConfig(Config):
    """Sizes of the parallel dimensions; what is left of the devices is data parallel."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="Devices that share every layer (tp).")
    pipeline_model_parallel_size: int = Field(
        1, ge=1, description="Stages that the layers are cut into (pp); this version runs one."
    )

    @model_validator(mode="after")
    def _one_stage(self) -> Self:
        if self.pipeline_model_parallel_size > 1:
            raise ValueError(
                f"pipeline_model_parallel_size={self.pipeline_model_parallel_size}: this version runs one stage; "
                "leave it out and use --tensor-model-parallel-size"
            )
        return self

    def layout(self, world_size: int) -> "Layout":
        """Return the layout on `world_size` devices.

        Raises:
            ConfigError: tp does not divide the number of devices.
        """
        tp = self.tensor_model_parallel_size
        if world_size % tp:
            raise ConfigError(
                f"tensor_model_parallel_size={tp} does not divide the {world_size} processes; "
                f"choose one of {', '.join(map(str, divisors(world_size)))} or start a multiple of {tp}"
            )
        return Layout(tp=tp, dp=world_size // tp)

    def check_model(self, model: ModelConfig) -> None:
        """Raise `ConfigError` when the model cannot be cut this way."""
        tp = self.tensor_model_parallel_size
        for name in ("num_attention_heads", "num_key_value_heads", "ffn_hidden_size"):
            size = getattr(model, name)
            if size % tp:
                fitting = [n for n in divisors(model.num_key_value_heads) if model.ffn_hidden_size % n == 0]
                raise ConfigError(
                    f"tensor_model_parallel_size={tp} does not divide {name}={size}; "
                    f"choose {', '.join(map(str, fitting))}"
                )


@dataclass(frozen=True)
class Layout:
    """Number of devices along each dimension; tp varies fastest with the rank, then dp."""

    tp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        """All devices."""
        return self.tp * self.dp

    def __str__(self) -> str:
        return f"tp{self.tp} x dp{self.dp}"


def divisors(number: int) -> list[int]:
    """Return the divisors of `number`, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
