"""The one door through which weights come in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_data.errors import AscendSpeedError

Kind = Literal["native", "huggingface", "ascendspeed", "megatron", "torch_dist", "deepspeed"]
"""Kinds of checkpoints."""

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
        kind: what it is, such as `huggingface`, `native` or `random`.
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
    if not _lies_in(folder, path):
        raise CheckpointError(
            f"{path} is a link to {path.resolve()}, which is outside the folder; refused, copy the file itself"
        )
    return path


def _lies_in(folder: Path, path: Path) -> bool:
    """Tell whether a file really lies in a folder, or in the blobs of the hub's cache that the folder belongs to."""
    place, real = folder.resolve(), path.resolve()
    if real.is_relative_to(place):
        return True
    return place.parent.name == "snapshots" and real.is_relative_to(place.parents[1] / "blobs")
