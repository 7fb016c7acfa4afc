"""Read a native checkpoint (torch.distributed.checkpoint, DCP) by slices, without processes and without pickles.

Layout of a run's folder, all of it written by `training.checkpoint`:

    latest_checkpointed_iteration.txt    "100"
    iter_0000100/checkpoint.json         model config, iteration, run config; written last
    iter_0000100/.metadata, *.distcp     DCP: tensors by logical name, cut as they were
    iter_0000100/checksums.json          CRC-32 of every piece
    tokenizer/                           files of the tokenizer, if the run was told which

Tensor names: `model/NAME`, `optimizer/exp_avg/NAME`, `optimizer/exp_avg_sq/NAME`, `optimizer/master/NAME`,
`rng/RANK`. A checkpoint is one logical model: where it was cut shows only in the list of chunks.
"""

import pickle
import re
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.files.file_tensor import StoredTensor
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.files.torch_files import INERT_PACKAGES, InertObject, TorchFile
from ascendspeed_core.weights.source import BaseWeightSource, CheckpointError, Index, TensorInfo, inside
from ascendspeed_data.errors import ConfigError
from ascendspeed_data.manifest import DatasetManifest, read_manifest

FORMAT_VERSION = 1
CHECKSUMS = "checksums.json"
TRACKER = "latest_checkpointed_iteration.txt"
DESCRIPTION = "checkpoint.json"
TOKENIZER = "tokenizer"
DATA_MANIFEST = "data.manifest.json"
ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")

_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
    *(
        ("torch", name)
        for name in ("float64", "float32", "bfloat16", "float16", "uint8", "int64", "int32", "bool")
    ),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickle DCP's `.metadata` and nothing else: any other class is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in INERT_PACKAGES:
            return type(name.rpartition(".")[2], (InertObject,), {})
        if (module, name) not in _ALLOWED:
            raise CheckpointError(
                f"its .metadata asks for {module}.{name}, which no checkpoint needs; refused"
            )
        return super().find_class(module, name)


class DistributedTensors:
    """All tensors of one DCP folder by name, readable by slice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[tuple[str, tuple[int, ...]], StoredTensor] = {}
        self._lock = threading.Lock()
        self._checksums = read_json(folder / CHECKSUMS) if (folder / CHECKSUMS).is_file() else {}
        path = folder / ".metadata"
        try:
            with path.open("rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete") from None
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; use an earlier checkpoint") from None

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return [
            name for name, found in self._metadata.state_dict_metadata.items() if hasattr(found, "chunks")
        ]

    def info(self, name: str) -> TensorInfo:
        """Return shape and format of a tensor."""
        found = self._metadata.state_dict_metadata[name]
        return TensorInfo(tuple(found.size), found.properties.dtype)

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a slice, put together from the chunks that it touches."""
        info = self.info(name)
        wanted = index or tuple(slice(0, length) for length in info.shape)
        for chunk in self._metadata.state_dict_metadata[name].chunks:
            inner = [
                slice(part.start - start, part.stop - start)
                for part, start in zip(wanted, chunk.offsets, strict=True)
            ]
            if all(p.start >= 0 and p.stop <= size for p, size in zip(inner, chunk.sizes, strict=True)):
                return self._chunk(name, chunk.offsets).read(tuple(inner))
        result = torch.empty([part.stop - part.start for part in wanted], dtype=info.dtype)
        for chunk in self._metadata.state_dict_metadata[name].chunks:
            overlap = [
                (max(part.start, start), min(part.stop, start + length))
                for part, start, length in zip(wanted, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(start >= stop for start, stop in overlap):
                continue
            stored = self._chunk(name, chunk.offsets)
            source = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, chunk.offsets, strict=True))
            target = tuple(slice(a - p.start, b - p.start) for (a, b), p in zip(overlap, wanted, strict=True))
            result[target] = stored.read(source)
        return result

    def check(self) -> None:
        """Read everything once and compare the checksums.

        Raises:
            CheckpointError: a piece is damaged, or in another one's place.
        """
        for name in self.names():
            for chunk in self._metadata.state_dict_metadata[name].chunks:
                self._chunk(name, chunk.offsets)

    def _chunk(self, name: str, offsets: torch.Size) -> StoredTensor:
        """Return a piece, whose checksum is compared the first time."""
        key = (name, tuple(offsets))
        with self._lock:
            if key not in self._opened:
                self._opened[key] = self._open(name, offsets)
            return self._opened[key]

    def _open(self, name: str, offsets: torch.Size) -> StoredTensor:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        place = self._metadata.storage_data[MetadataIndex(name, offsets)]
        path = inside(self.folder, place.relative_path)
        if path.stat().st_size < place.offset + place.length:
            raise CheckpointError(
                f"{path} is cut short: {name} needs bytes up to {place.offset + place.length}"
            )
        try:
            stored = TorchFile(path, place.offset, place.length)
            stored.check()
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} is damaged at {name}: {error}; use an earlier checkpoint"
            ) from None
        content = stored.content
        expected = self._checksums.get(name, {}).get(",".join(map(str, offsets)))
        if not isinstance(content, StoredTensor) or expected not in (None, stored.checksums()["data/0"]):
            raise CheckpointError(
                f"{path} holds something else where {name} should be; files were swapped, copy the checkpoint again"
            )
        return content


class NativeSource(BaseWeightSource):
    """The weights of a native checkpoint, and what else stands in it.

    Args:
        path: a run's folder, or one `iter_*` folder in it.
        is_adapter: adapters are wanted, without the weights that they belong to.
    """

    kind = "native"

    def __init__(self, path: Path, is_adapter: bool = False) -> None:
        self.path: Path | None = path
        self.folder = iteration_folder(path)
        self.description = read_json(self.folder / DESCRIPTION)
        version = self.description.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{self.folder}: format_version={version}, this version reads {FORMAT_VERSION}; "
                "use the ascendspeed-core that wrote it"
            )
        adapters = self.description.get("adapters")
        if adapters and not is_adapter:
            raise CheckpointError(
                f"{self.folder} holds an adapter only; give its base ({adapters['base'] or 'random weights'}) with "
                f"--load, and this folder with --lora-load"
            )
        if is_adapter and not adapters:
            raise CheckpointError(
                f"{self.folder} holds all weights, not an adapter; give it with --load, without options of adapters"
            )
        try:
            self.config: ModelConfig = validate(ModelConfig, self.description["model"])
        except (ConfigError, KeyError) as error:
            raise CheckpointError(f"{self.folder / DESCRIPTION}: no valid model config: {error}") from None
        self.stored = DistributedTensors(self.folder)

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer that the run was told of, if any."""
        for folder in (self.folder, self.folder.parent):
            if (folder / TOKENIZER).is_dir():
                return folder / TOKENIZER
        return None

    @property
    def data_manifest(self) -> DatasetManifest | None:
        """Manifest of the data that the run was trained on, if it had one."""
        return find_data_manifest(self.folder)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every weight by its name."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        prefix = "model/"
        return {
            name.removeprefix(prefix): self.stored.info(name)
            for name in self.stored.names()
            if name.startswith(prefix)
        }

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a slice of a weight."""
        return self.stored.read(f"model/{name}", index)

    def other_contents(self) -> list[str]:
        """Name the kinds of state that are stored beside the weights: `optimizer`, `rng`, ..."""
        return sorted({name.partition("/")[0] for name in self.stored.names()} - {"model"})

    def details(self) -> dict[str, Any]:
        """Return the iteration, and the layout of the run that wrote the checkpoint."""
        return {"iteration": self.description["iteration"], "layout": self.description["layout"]}

    def check(self) -> bool:
        """Read everything once and compare the checksums."""
        self.stored.check()
        return True


def find_data_manifest(folder: Path) -> DatasetManifest | None:
    """Return the manifest of the training data beside a checkpoint, or in the folder of its run, if there is one."""
    for candidate in (folder, folder.parent):
        if (candidate / DATA_MANIFEST).is_file():
            return read_manifest(candidate / DATA_MANIFEST)
    return None


def iteration_folder(path: Path) -> Path:
    """Return the checkpoint to use: `path` itself, or the one that the run's tracker names.

    Raises:
        CheckpointError: there is none, or it is incomplete.
    """
    if (path / DESCRIPTION).is_file():
        return path
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(f"{path} holds no checkpoint: neither {DESCRIPTION} nor {TRACKER} is there")
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdecimal():
        raise CheckpointError(
            f"{tracker} says {text!r}, not an iteration; write the number of a complete checkpoint"
        )
    folder = path / f"iter_{int(text):07d}"
    if not (folder / DESCRIPTION).is_file():
        complete = sorted(p.name for p in path.glob("iter_*") if (p / DESCRIPTION).is_file())
        raise CheckpointError(
            f"{tracker} names iteration {text}, but {folder.name} is missing or incomplete; "
            f"complete are {', '.join(complete) or 'none'}: name one of these folders with --load"
        )
    return folder
