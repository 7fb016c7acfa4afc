"""`ascendspeed.json`, which asd-ckpt writes beside external checkpoints: what their own format cannot say."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.source import CheckpointError
from ascendspeed_data.errors import ConfigError
from ascendspeed_data.small_files import COPY_AGAIN, check_shape

SIDECAR = "ascendspeed.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Sidecar:
    """The content of `ascendspeed.json`.

    Attributes:
        kind: `ascendspeed`, `megatron` or `torch_dist`.
        model: the architecture; its vocabulary is without padding.
        vocabulary_rows: rows of embedding and head with padding.
        layout: the tensor- and pipeline-parallel layout in words.
        checkpoint: an id that all files of one conversion share.
        checksums: CRC-32 of each tensor's bytes, by file and by tensor name.
    """

    kind: str
    model: ModelConfig
    vocabulary_rows: int
    layout: str
    checkpoint: str
    checksums: Mapping[str, Mapping[str, int]]


class _Content(Config):
    """The shape of `ascendspeed.json`, without its version."""

    kind: str
    model: dict[str, Any]
    vocabulary_rows: int
    layout: str
    checkpoint: str
    checksums: dict[str, dict[str, int]]


def written_by(sidecar: Sidecar | None) -> str:
    """Return which program wrote a checkpoint, for `asd-ckpt inspect`."""
    return "another program" if sidecar is None else "asd-ckpt"


def read_sidecar(folder: Path) -> Sidecar | None:
    """Return the sidecar in `folder`, or `None` when another program wrote the checkpoint.

    Raises:
        CheckpointError: it is damaged, or of a later version.
    """
    path = folder / SIDECAR
    if not path.is_file():
        return None
    content: dict[str, Any] = read_json(path)
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version={version}, but this version reads {FORMAT_VERSION}; use the ascendspeed-ckpt "
            "that wrote it"
        )
    check_shape(content, _Content, f"{path} is damaged", COPY_AGAIN, CheckpointError)
    try:
        return Sidecar(**content | {"model": validate(ModelConfig, content["model"], strict=True)})
    except ConfigError as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it again") from None
