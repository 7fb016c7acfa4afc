"""Options of `asd-core timeline`."""

from pathlib import Path

from pydantic import Field

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.config.training import (
    BatchConfig,
    ComputeConfig,
    LaunchConfig,
    PrecisionConfig,
    RecomputeConfig,
)


class DrawingConfig(Config):
    """What is measured, and where the picture goes."""

    picture: Path = Field(Path("timeline.png"), description="PNG file; the numbers go beside it as .json.")
    seq_length: int = Field(ge=1, description="Tokens of one sample, S; random ones are used.")


class TimelineConfig(Config):
    """Everything `asd-core timeline` takes."""

    source: ModelSourceConfig
    drawing: DrawingConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    batch: BatchConfig
    recompute: RecomputeConfig = RecomputeConfig()
    compute: ComputeConfig = ComputeConfig()
    launch: LaunchConfig = LaunchConfig()
