"""What we write beside the weights of a foreign checkpoint: everything that its own format cannot say."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.huggingface.source import read_json
from ascendspeed_core.weights.source import CheckpointError
from ascendspeed_data.errors import ConfigError
from ascendspeed_data.files import write_durably

RECORD = "ascendspeed.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Record:
    """The content of `ascendspeed.json`.

    Attributes:
        kind: `ascendspeed`, `megatron` or `torch_dist`.
        model: the architecture, with the vocabulary that is not filling.
        vocabulary_rows: rows of embedding and head with filling.
        layout: in words.
        checkpoint: a name that all files of one conversion share.
        checksums: by file and name in it the CRC-32 of a tensor's bytes.
    """

    kind: str
    model: ModelConfig
    vocabulary_rows: int
    layout: str
    checkpoint: str
    checksums: Mapping[str, Mapping[str, int]]

    def write(self, folder: Path) -> None:
        """Write it; the last file of a checkpoint."""
        content = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "layout": self.layout,
            "vocabulary_rows": self.vocabulary_rows,
            "checkpoint": self.checkpoint,
            "model": self.model.model_dump(mode="json"),
            "checksums": self.checksums,
        }
        write_durably(folder / RECORD, json.dumps(content, indent=1) + "\n")


def read_record(folder: Path) -> Record | None:
    """Return what `folder` says of itself, or `None` when another program wrote it.

    Raises:
        CheckpointError: it is damaged, or of a later version.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    content: dict[str, Any] = read_json(path)
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version={version}, this version reads {FORMAT_VERSION}; use the one that wrote it"
        )
    try:
        return Record(**content | {"model": validate(ModelConfig, content["model"])})
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; copy it again") from None
