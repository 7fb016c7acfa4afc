"""The shape of `checkpoint.json`, which describes a native checkpoint."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ascendspeed_core.config.base import Config
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.source import CheckpointError
from ascendspeed_data.small_files import COPY_AGAIN, check_shape

FORMAT_VERSION = 1


class _LowRank(Config):
    rank: int = Field(ge=1)
    scale: float
    dropout: float = 0.0


class _Adapters(Config):
    base: str | None
    layers: dict[str, _LowRank]
    trained: list[str]


class _LossScale(BaseModel):
    model_config = ConfigDict(extra="allow")

    scale: float = Field(gt=0)
    steps_without_overflow: int
    overflows_left: int


class _Description(BaseModel):
    """What every version writes, and what is read of it."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    iteration: int = Field(ge=0)
    consumed_samples: int = Field(ge=0)
    skipped_samples: int = Field(ge=0)
    optimizer_steps: int = Field(ge=0)
    data_order: dict[str, Any]
    order_digest: str
    layout: dict[str, Any]
    loss_scale: _LossScale | None
    model: dict[str, Any]
    run: dict[str, Any]
    adapters: _Adapters | None = None


def read_description(path: Path) -> dict[str, Any]:
    """Read a `checkpoint.json`.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    content: dict[str, Any] = read_json(path)
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version={version}, this version reads {FORMAT_VERSION}; use the ascendspeed-core that "
            "wrote it"
        )
    check_shape(content, _Description, str(path), COPY_AGAIN, CheckpointError)
    return content
