"""Options of `asd-core timeline`."""

from pathlib import Path

from pydantic import Field

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.config.training import (
    ComputeConfig,
    EvaluationConfig,
    LaunchConfig,
    LoggingConfig,
    PrecisionConfig,
    RecomputeConfig,
    TrainingConfig,
)


class DrawingConfig(Config):
    """What is measured, and where the picture goes."""

    picture: Path = Field(Path("timeline.png"), description="PNG file; the numbers go beside it as .json.")
    seq_length: int = Field(ge=1, description="Tokens of one sample, S; random ones are used.")


class TimelineConfig(Config):
    """Everything `asd-core timeline` takes; of `training`, `evaluation` and `logging` it uses the seed alone."""

    source: ModelSourceConfig
    drawing: DrawingConfig
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    batch: BatchConfig = BatchConfig()
    training: TrainingConfig
    recompute: RecomputeConfig = RecomputeConfig()
    compute: ComputeConfig = ComputeConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    launch: LaunchConfig = LaunchConfig()
