"""Options of the commands of `asd-infer`."""

from pathlib import Path

from pydantic import Field

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.model import ArchitectureFlags
from ascendspeed_core.config.parallel import Layout, ParallelConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.config.training import LaunchConfig, PrecisionConfig
from ascendspeed_data.errors import ConfigError


class TokenizerConfig(Config):
    """Which tokenizer, when the checkpoint came without one."""

    tokenizer_name_or_path: Path | None = Field(
        None, description="Tokenizer folder. [default: the checkpoint's own]"
    )
    tokenizer_type: str = Field(
        "PretrainedFromHF", description="Kind of tokenizer; PretrainedFromHF is the only one."
    )
    tokenizer_not_use_fast: bool = Field(
        False,
        description="Accepted for old scripts: ids are exact either way.",
        json_schema_extra={"off": ""},
    )


class SamplingConfig(Config):
    """How a text is continued."""

    max_new_tokens: int = Field(128, ge=1, description="Tokens to generate, unless the text ends before.")
    do_sample: bool = Field(False, description="Draw tokens; otherwise the likeliest is taken.")
    temperature: float = Field(1.0, gt=0, description="Flattens (above 1) or sharpens the distribution.")
    top_k: int = Field(0, ge=0, description="Draw only from the k likeliest tokens; 0 is all.")
    top_p: float = Field(
        1.0, gt=0, le=1, description="Draw only from the smallest set with this probability."
    )
    seed: int = Field(1234, description="Seed of the draws, and of random weights.")
    stop: tuple[str, ...] = Field((), description="Texts that end a completion.")
    ignore_eos: bool = Field(False, description="Go on past end-of-text ids.", json_schema_extra={"off": ""})


def inference_layout(parallel: ParallelConfig, world_size: int) -> Layout:
    """Return the layout of a model that only answers; every process must hold a part of it.

    Raises:
        ConfigError: some processes would only repeat what others compute.
    """
    layout = parallel.layout(world_size)
    if layout.dp > 1:
        raise ConfigError(
            f"tensor_model_parallel_size={layout.tp} leaves {world_size} processes to compute the same {layout.dp} "
            f"times; give --tensor-model-parallel-size {world_size // layout.pp}, or start {layout.tp * layout.pp}"
        )
    return layout


class GenerateConfig(Config):
    """Everything `asd-infer generate` takes."""

    source: ModelSourceConfig
    model: ArchitectureFlags = ArchitectureFlags()
    tokenizer: TokenizerConfig = TokenizerConfig()
    sampling: SamplingConfig = SamplingConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    launch: LaunchConfig = LaunchConfig()
