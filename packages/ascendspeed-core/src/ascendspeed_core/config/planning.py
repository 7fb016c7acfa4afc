"""Options of `asd-core plan` and `asd-core profile-device`; no torch."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ascendspeed_core.config.base import Config, spellings
from ascendspeed_core.config.layout import PipelineSchedule
from ascendspeed_core.config.training import LaunchConfig

MEASURED_FORMATS = ("float32", "bfloat16", "float16")


class PlanConfig(Config):
    """What is to be trained, on what, and what is already decided."""

    model: str = Field(
        description="Size of `asd-core models`, such as llama-65b, or a Hugging Face folder or config.json."
    )
    device: str = Field(
        description="Profile of the device: its name, such as ascend-910b or h100, or a file of "
        "`asd-core profile-device`.",
    )
    devices: int = Field(1, ge=1, le=1_000_000, description="How many of them.")
    seq_length: int | None = Field(
        None, ge=1, description="Tokens of a sample. [default: the model's longest, at most 4096]"
    )
    global_batch_size: int | None = Field(
        None,
        ge=1,
        description="Samples of an optimizer step. [default: about 4 million tokens, at least one a device]",
    )
    tokens: float | None = Field(
        None, gt=0, description="Tokens of the whole training, for its time and energy; 1e12 is a trillion."
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None,
        description="Format of weights and arithmetic. [default: bfloat16, or float16 where the device has none]",
    )
    memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory that a step may take on each device. [default: the profile's, less 1 GiB for libraries]",
    )
    allocator_margin: float = Field(
        0.08,
        ge=0,
        lt=1,
        description="Share of what tensors take that the allocator leaves unused beside them.",
    )
    top: int = Field(5, ge=1, description="Plans to show of those that fit.")
    tensor_model_parallel_size: int | None = Field(None, ge=1, description="Plan with this tp only.")
    pipeline_model_parallel_size: int | None = Field(None, ge=1, description="Plan with this pp only.")
    context_parallel_size: int | None = Field(None, ge=1, description="Plan with this cp only.")
    expert_model_parallel_size: int | None = Field(None, ge=1, description="Plan with this ep only.")
    micro_batch_size: int | None = Field(None, ge=1, description="Plan with this micro-batch only.")
    pipeline_schedule: PipelineSchedule | None = Field(None, description="Plan with this schedule only.")
    recompute: Literal["none", "selective", "full"] | None = Field(
        None, description="Plan with this recompute in all layers only."
    )
    sharding: Literal["none", "optimizer", "zero1", "zero2", "zero3"] | None = Field(
        None,
        description="Plan with this only: replicated; --use-distributed-optimizer; or DeepSpeed's stages, which are "
        "tried only when they are asked for.",
    )
    recipe: Path | None = Field(
        None,
        description="Write the best plan as a TOML file for `asd-core pretrain --config`, and the model's config.json "
        "beside it.",
    )
    charts: Path | None = Field(
        None,
        description="Folder for memory.png, time.png and pareto.png.",
        json_schema_extra=spellings("--chart"),
    )

    def fixed(self) -> dict[str, object]:
        """Return what is decided, by the names of `planner.search`."""
        names = {
            "tp": self.tensor_model_parallel_size,
            "pp": self.pipeline_model_parallel_size,
            "cp": self.context_parallel_size,
            "ep": self.expert_model_parallel_size,
            "micro_batch": self.micro_batch_size,
            "schedule": self.pipeline_schedule,
            "recompute": self.recompute,
            "sharding": self.sharding,
        }
        return {name: value for name, value in names.items() if value is not None}


class ProfileDeviceConfig(Config):
    """What is measured, and where it goes."""

    output: Path = Field(Path("device.toml"), description="TOML file for `asd-core plan --device`.")
    name: str = Field("my-device", min_length=1, description="Name of the profile.")
    budget_seconds: float = Field(
        120.0, gt=0, description="About how long it measures; collectives take a fifth of it."
    )
    quick: bool = Field(
        False,
        description="Measure small sizes only: a rough profile in seconds.",
        json_schema_extra={"off": ""},
    )
    dtypes: tuple[str, ...] = Field(
        ("float32", "bfloat16"),
        description="Formats to measure: float32, bfloat16, float16.",
        json_schema_extra=spellings("--dtype"),
    )
    watts: float = Field(
        300.0, gt=0, description="Power of one device under load, for energy; it cannot be measured here."
    )

    @model_validator(mode="after")
    def _formats_are_known(self) -> "ProfileDeviceConfig":
        unknown = [name for name in self.dtypes if name not in MEASURED_FORMATS]
        if unknown:
            raise ValueError(
                f"dtypes={unknown[0]} is no format that is measured; choose {', '.join(MEASURED_FORMATS)}"
            )
        return self


class DeviceProfilingConfig(Config):
    """Everything `asd-core profile-device` takes."""

    profile: ProfileDeviceConfig = ProfileDeviceConfig()
    launch: LaunchConfig = LaunchConfig()
