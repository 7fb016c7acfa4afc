"""Read torch's distributed checkpoints (DCP) by slices, in one process, without running their pickles."""

import pickle
import threading
from math import prod
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.weights.files.file_tensor import StoredTensor
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.files.torch_files import INERT_PACKAGES, InertObject, TorchFile
from ascendspeed_core.weights.source import CheckpointError, Index, TensorInfo, inside

CHECKSUMS = "checksums.json"

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


def _check_metadata(metadata: Any) -> None:
    """Raise `ValueError` unless unpickled metadata is what it says it is: damage may put any value anywhere."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

    if not isinstance(metadata, Metadata):
        raise ValueError(f"it holds {type(metadata).__name__}, no metadata")
    stored_at = {
        (index.fqn, None if index.offset is None else tuple(index.offset)): where
        for index, where in metadata.storage_data.items()
    }
    for name, found in metadata.state_dict_metadata.items():
        if isinstance(found, BytesStorageMetadata):
            continue
        if type(name) is not str or not isinstance(found, TensorStorageMetadata):
            raise ValueError(f"{name!r} is neither a tensor nor an object")
        if not isinstance(found.properties.dtype, torch.dtype) or not _are_sizes(found.size):
            raise ValueError(f"{name} has size {found.size!r} and dtype {found.properties.dtype!r}")
        for chunk in found.chunks:
            parts = zip(chunk.offsets, chunk.sizes, found.size, strict=True)
            if not (_are_sizes(chunk.offsets) and _are_sizes(chunk.sizes)) or any(
                start + length > whole for start, length, whole in parts
            ):
                raise ValueError(f"{name} of size {list(found.size)} has a shard outside of it")
            where = stored_at.get((name, tuple(chunk.offsets)))
            if where is None or type(where.relative_path) is not str:
                raise ValueError(f"{name} has a shard that lies nowhere")
            if not _are_sizes((where.offset, where.length)):
                raise ValueError(f"{name} has a shard of {where.length!r} bytes at {where.offset!r}")
        if sum(prod(chunk.sizes) for chunk in found.chunks) < prod(found.size):
            raise ValueError(f"{name} of size {list(found.size)} has shards for a part of it only")


def _are_sizes(values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


class DistributedTensors:
    """All tensors of one DCP folder by name, readable by slice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[tuple[str, tuple[int, ...]], StoredTensor] = {}
        self._lock = threading.Lock()
        checksums = folder / CHECKSUMS
        self._checksums = read_json(checksums, dict[str, dict[str, int]]) if checksums.is_file() else {}
        path = folder / ".metadata"
        try:
            with path.open("rb") as file:
                self._metadata = _MetadataUnpickler(file).load()
            _check_metadata(self._metadata)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete") from None
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        except Exception as error:  # noqa: BLE001 - a pickle can be wrong in any way; the file is what is wrong
            reason = str(error) or type(error).__name__
            raise CheckpointError(f"{path} is damaged: {reason}; use an earlier checkpoint") from None

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return [
            name for name, found in self._metadata.state_dict_metadata.items() if hasattr(found, "chunks")
        ]

    def objects(self) -> list[str]:
        """Return the names of everything that is no tensor; none of it is read."""
        return sorted(set(self._metadata.state_dict_metadata) - set(self.names()))

    def info(self, name: str) -> TensorInfo:
        """Return shape and format of a tensor."""
        found = self._metadata.state_dict_metadata[name]
        return TensorInfo(tuple(found.size), found.properties.dtype)

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a slice, put together from the shards that it touches."""
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
            CheckpointError: a shard is damaged, or swapped with another one.
        """
        for name in self.names():
            for chunk in self._metadata.state_dict_metadata[name].chunks:
                self._chunk(name, chunk.offsets)

    def _chunk(self, name: str, offsets: torch.Size) -> StoredTensor:
        """Open a shard; its checksum is compared the first time."""
        key = (name, tuple(offsets))
        with self._lock:
            if key not in self._opened:
                self._opened[key] = self._open(name, offsets)
            return self._opened[key]

    def _open(self, name: str, offsets: torch.Size) -> StoredTensor:
        from torch.distributed.checkpoint.metadata import MetadataIndex

        stored_at = self._metadata.storage_data[MetadataIndex(name, offsets)]
        path = inside(self.folder, stored_at.relative_path)
        if path.stat().st_size < stored_at.offset + stored_at.length:
            raise CheckpointError(
                f"{path} is cut short: {name} needs bytes up to {stored_at.offset + stored_at.length}"
            )
        try:
            stored = TorchFile(path, stored_at.offset, stored_at.length)
            stored.check()
        except CheckpointError as error:
            raise CheckpointError(
                f"{path} is damaged at {name}: {error}; use an earlier checkpoint"
            ) from None
        content = stored.content
        position = ",".join(map(str, offsets))
        expected = self._checksums.get(name, {}).get(position)
        if self._checksums and expected is None:
            raise CheckpointError(
                f"{self.folder / CHECKSUMS} lacks {name} at {position or 0}; use an earlier checkpoint"
            )
        chunks = self._metadata.state_dict_metadata[name].chunks
        sizes = next(tuple(chunk.sizes) for chunk in chunks if chunk.offsets == offsets)
        wanted = TensorInfo(sizes, self.info(name).dtype)
        is_same = expected in (None, stored.checksums().get("data/0"))
        if not isinstance(content, StoredTensor) or content.info != wanted or not is_same:
            raise CheckpointError(
                f"{path} holds something else where {name} should be; files were swapped, copy the checkpoint again"
            )
        return content
