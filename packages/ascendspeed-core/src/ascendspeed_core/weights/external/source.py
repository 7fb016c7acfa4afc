"""What the sources of external checkpoints have in common."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.external.name_maps import EMBEDDING, ROTARY
from ascendspeed_core.weights.external.sharded_tensors import ShardedTensors
from ascendspeed_core.weights.source import BaseWeightSource, Index, LeftOut, TensorInfo, group_left_out
from ascendspeed_data.tokenizer import DEFINING_FILES


class ExternalSource(BaseWeightSource):
    """The weights of an external checkpoint, whose tensors are shards of ours.

    Attributes:
        path: the folder as the user named it.
        folder: the one with the files.
        config: the architecture.
        vocabulary_rows: rows of the embedding with padding.
    """

    path: Path | None
    folder: Path
    config: ModelConfig
    vocabulary_rows: int
    _sharded: ShardedTensors

    def __init__(self) -> None:
        self._left_out: dict[str, str] = {}

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer beside the weights, if any."""
        for folder in (self.folder, self.folder.parent):
            for candidate in (folder, folder / "tokenizer"):
                if any((candidate / name).is_file() for name in DEFINING_FILES):
                    return candidate
        return None

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every weight by our name."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {name: self._sharded.info(name) for name in self._sharded.names() if name != ROTARY}

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a slice of a weight."""
        return self._sharded.read(name, index)

    def left_out(self) -> Sequence[LeftOut]:
        """Return padding, copies of other tensors and what the config says too."""
        rows = self.vocabulary_rows - self.config.vocab_size
        padding = {
            f"rows {self.config.vocab_size} to {self.vocabulary_rows - 1} of embedding and head": "padding"
        }
        copies = dict.fromkeys(
            self._sharded.copies(EMBEDDING), "equal to the embedding, to which the head is tied"
        )
        return group_left_out(self._left_out | copies | (padding if rows else {}))

    def details(self) -> dict[str, Any]:
        """Return the layout of the files, and the rows of the embedding with padding."""
        layout = {} if self.layout is None else {"layout": str(self.layout)}
        return layout | {"vocabulary_rows": self.vocabulary_rows}
