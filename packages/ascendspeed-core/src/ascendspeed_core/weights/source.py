"""`WeightSource`: the one interface through which weights are read, whatever holds them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.lora import AdapterPlan
from ascendspeed_core.weights.shard_layout import ShardLayout
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.manifest import DatasetManifest, read_manifest

Kind = Literal["native", "huggingface", "ascendspeed", "megatron", "torch_dist", "deepspeed"]
"""Kinds of checkpoints that are read."""

WEIGHT_DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
"""Formats of numbers that are weights as they stand."""

DATA_MANIFEST = "data.manifest.json"
"""File beside weights: what the data that they were trained on is, with the layout of its conversations."""

Index = tuple[slice, ...]
"""One slice with start and stop per dimension; an empty tuple is the whole tensor."""


class CheckpointError(AscendSpeedError):
    """A checkpoint is missing, incomplete, damaged, or does not fit the model."""


class UnknownModelError(CheckpointError):
    """A checkpoint may be whole, but does not say what model it is."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the whole tensor."""
        size = self.dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class ReadableTensor(Protocol):
    """A stored tensor."""

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype."""
        ...

    def read(self, index: Index = ()) -> torch.Tensor:
        """Read a slice."""
        ...


@dataclass(frozen=True)
class LeftOut:
    """Something in the files that is no weight of the model as it is read.

    Attributes:
        names: what it is called there.
        reason: why nothing is lost with it, or what is.
    """

    names: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        """Return it in one line: the first name, how many there are, the reason."""
        more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        return f"{self.names[0]}{more} ({self.reason})"


class WeightSource(Protocol):
    """All weights of one logical model, whole, under this project's parameter names.

    Implementations inherit the defaults of `BaseWeightSource`.

    Attributes:
        kind: what it is, such as `huggingface`, `native` or `random`.
        path: the folder as the user named it, for messages; `None` when there is none.
        config: the architecture.
    """

    kind: str
    path: Path | None
    config: ModelConfig

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return shape and dtype of every tensor by parameter name."""
        ...

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a tensor or a slice of it, on the CPU, in the dtype that it is stored in."""
        ...

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer that came with the weights, if any."""
        ...

    @property
    def data_manifest(self) -> DatasetManifest | None:
        """Manifest of the data that the weights were trained on, if it came with them."""
        ...

    @property
    def base(self) -> "WeightSource | None":
        """The source that this one changes as it is read; `None` for a checkpoint itself."""
        ...

    @property
    def adapters(self) -> AdapterPlan | None:
        """Which LoRA adapters the weights include, if any."""
        ...

    @property
    def layout(self) -> ShardLayout | None:
        """How the files are split over tensor-parallel ranks and pipeline stages; `None` when they are not."""
        ...

    def other_contents(self) -> list[str]:
        """Name what is stored beside the weights of the model, such as `optimizer`."""
        ...

    def left_out(self) -> Sequence[LeftOut]:
        """Name the stored tensors that are no weights, such as a copy of another one, with the reason for each."""
        ...

    def details(self) -> dict[str, Any]:
        """Return what this kind of checkpoint says of itself beyond weights and architecture, as JSON values."""
        ...

    def check(self) -> bool:
        """Read everything once and compare it with the stored checksums.

        Returns:
            Whether there are checksums to compare with.

        Raises:
            CheckpointError: something is damaged, or files of different checkpoints were mixed.
        """
        ...


class BaseWeightSource:
    """What holds for a source unless it says otherwise."""

    path: Path | None = None
    base: WeightSource | None = None
    adapters: AdapterPlan | None = None
    layout: ShardLayout | None = None

    @property
    def tokenizer(self) -> Path | None:
        """Return `None`: no tokenizer came along."""
        return None

    @property
    def data_manifest(self) -> DatasetManifest | None:
        """Return the manifest of the source underneath, or the one that was converted with the weights."""
        if self.base is not None:
            return self.base.data_manifest
        return read_data_manifest(self.path) if self.path is not None else None

    def other_contents(self) -> list[str]:
        """Return nothing: only weights are stored."""
        return []

    def left_out(self) -> Sequence[LeftOut]:
        """Return what the source underneath leaves out, if there is one."""
        return self.base.left_out() if self.base is not None else ()

    def details(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def check(self) -> bool:
        """Return `False`: there are no checksums."""
        return False


def read_data_manifest(folder: Path) -> DatasetManifest | None:
    """Return the manifest of the training data in a folder, if it is there."""
    path = folder / DATA_MANIFEST
    return read_manifest(path) if path.is_file() else None


def stored_source(source: WeightSource) -> WeightSource:
    """Return the checkpoint itself, without the changes that are made as it is read."""
    while source.base is not None:
        source = source.base
    return source


def group_left_out(reasons: Mapping[str, str]) -> list[LeftOut]:
    """Return what is left out, names with the same reason together.

    Args:
        reasons: by name.
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return [LeftOut(tuple(found), reason) for reason, found in names.items()]


def inside(folder: Path, name: str) -> Path:
    """Return `folder / name`, which an index file named, if it really lies in `folder`.

    Raises:
        CheckpointError: the name leads out of the folder, or to nothing.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(f"{folder}: its index names {name!r}, which is outside the folder; refused")
    if not _is_file(path):
        raise CheckpointError(
            f"{path} is missing, though the index of {folder} names it; copy the folder again"
        )
    if not _lies_in(folder, path):
        raise CheckpointError(
            f"{path} is a link to {path.resolve()}, which is outside the folder; refused, copy the file itself"
        )
    return path


def _is_file(path: Path) -> bool:
    """Tell whether a file is there; a name that no file can have is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _lies_in(folder: Path, path: Path) -> bool:
    """Tell whether a file really lies in a folder, or in the blobs of the hub's cache that the folder belongs to."""
    root, real = folder.resolve(), path.resolve()
    if real.is_relative_to(root):
        return True
    return root.parent.name == "snapshots" and real.is_relative_to(root.parents[1] / "blobs")
