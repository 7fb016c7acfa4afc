"""The one door through which weights come in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_data.errors import AscendSpeedError

Index = tuple[slice, ...]
"""One slice with start and stop per dimension; an empty tuple is the whole tensor."""


class CheckpointError(AscendSpeedError):
    """A checkpoint is missing, incomplete, damaged, or does not fit the model."""


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class WeightSource(Protocol):
    """Something that holds all weights of one logical model, uncut, under our names.

    Attributes:
        kind: what it is, `huggingface`, `native` or `random`.
        path: the folder as the user named it, for messages; `None` when there is none.
        config: the architecture.
        tokenizer: folder of the tokenizer that came with the weights, if any.
    """

    kind: str
    path: Path | None
    config: ModelConfig

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer that came with the weights, if any."""
        ...

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by our parameter name."""
        ...

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a tensor or a slice of it, on the CPU, in the format that it is stored in."""
        ...


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`, which an index file named, if it really lies in `folder`.

    Raises:
        CheckpointError: the name leads out of the folder, or to nothing.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{folder}: its index names {name!r}, which is outside the folder; refused")
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, though the index of {folder} names it; copy the folder again"
        )
    return path
