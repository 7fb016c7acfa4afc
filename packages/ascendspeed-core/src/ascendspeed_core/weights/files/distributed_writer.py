"""Write tensors in the files of torch's distributed checkpoint (DCP), from any number of ranks, as any shards.

Each rank writes one file, a sequence of archives in `torch.save`'s format. One rank then writes `.metadata`, a pickled
table that says where each shard lies. DCP's own writer needs all tensors of a rank at once, and writes only shards
that a DTensor can express. DCP reads what is written here, and so does `weights.files.distributed_reader`.
"""

import json
import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.sharding import Slice
from ascendspeed_core.device import HOST
from ascendspeed_core.weights.files.distributed_reader import CHECKSUMS
from ascendspeed_core.weights.files.torch_archive import ALIGNMENT, TorchArchive
from ascendspeed_core.weights.source import TensorInfo
from ascendspeed_core.weights.stream import as_bytes, write_all
from ascendspeed_data.files import write_durably


@dataclass(frozen=True)
class WrittenShard:
    """Where a shard of a tensor lies.

    Attributes:
        name: of the tensor.
        part: which part of the tensor it is.
        dtype: of its numbers.
        file: name of the file in the folder.
        start: first byte.
        length: bytes.
        checksum: CRC-32 of its numbers' bytes.
    """

    name: str
    part: Slice
    dtype: torch.dtype
    file: str
    start: int
    length: int
    checksum: int


@dataclass(frozen=True)
class WrittenObject:
    """Where an object that is not a tensor lies."""

    name: str
    file: str
    start: int
    length: int


class TensorFile:
    """The file of one rank, written from its start to its end.

    Args:
        folder: an existing folder.
        rank: number of the rank.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.shards: list[WrittenShard] = []
        self.objects: list[WrittenObject] = []
        self._path = folder / f"__{rank}_0.distcp"
        self._file = self._path.open("wb", buffering=0)

    def add(self, name: str, tensor: torch.Tensor, part: Slice | None = None) -> None:
        """Append a shard, or a whole tensor."""
        tensor = tensor.detach().to(HOST.torch).contiguous()
        self.add_slabs(name, TensorInfo(tuple(tensor.shape), tensor.dtype), [tensor], part)

    def add_slabs(
        self, name: str, info: TensorInfo, slabs: Iterable[torch.Tensor], part: Slice | None = None
    ) -> None:
        """Append a shard, or a whole tensor, whose rows come slab by slab.

        Args:
            name: of the tensor.
            info: shape and dtype of the shard.
            slabs: its bytes in order, contiguous, on the host.
            part: which part of the whole tensor it is.
        """
        whole = Slice(info.shape, tuple(slice(0, length) for length in info.shape))
        # Aligned, so that readers can look at the numbers where they lie.
        write_all(self._file, memoryview(bytes(-self._file.tell() % ALIGNMENT)))
        start = self._file.tell()
        with TorchArchive(self._file, info) as archive:
            archive.begin_tensor(info)
            for slab in slabs:
                archive.write(as_bytes(slab))
        length = self._file.tell() - start
        (checksum,) = archive.checksums
        self.shards.append(
            WrittenShard(name, part or whole, info.dtype, self._path.name, start, length, checksum)
        )

    def add_object(self, name: str, serialized: bytes) -> None:
        """Append an object that is not a tensor, as `torch.save` wrote it."""
        self.objects.append(WrittenObject(name, self._path.name, self._file.tell(), len(serialized)))
        write_all(self._file, memoryview(serialized))

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object) -> None:
        """Bring the bytes to the disk and close the file."""
        os.fsync(self._file.fileno())
        self._file.close()


def write_metadata(
    folder: Path, shards: Iterable[WrittenShard], objects: Iterable[WrittenObject] = ()
) -> None:
    """Write the table of all shards of all ranks, and their checksums beside it.

    `checksums.json` holds the CRC-32 of each shard by tensor and offset, so that swapped shards of the same shape are
    noticed.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, Any] = {}
    storage = {}
    checksums: dict[str, dict[str, int]] = {}
    for shard in shards:
        offsets = torch.Size(shard.part.offsets)
        entry = tensors.setdefault(
            shard.name,
            TensorStorageMetadata(
                properties=TensorProperties(dtype=shard.dtype), size=torch.Size(shard.part.shape), chunks=[]
            ),
        )
        storage[MetadataIndex(shard.name, offsets, len(entry.chunks))] = _StorageInfo(
            shard.file, shard.start, shard.length
        )
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(shard.part.sizes)))
        checksums.setdefault(shard.name, {})[",".join(map(str, shard.part.offsets))] = shard.checksum
    for stored in objects:
        tensors[stored.name] = BytesStorageMetadata()
        storage[MetadataIndex(stored.name)] = _StorageInfo(stored.file, stored.start, stored.length)
    metadata = Metadata(
        state_dict_metadata=tensors, planner_data={name: (name,) for name in tensors}, storage_data=storage
    )
    write_durably(folder / CHECKSUMS, json.dumps(checksums) + "\n")
    write_durably(folder / ".metadata", pickle.dumps(metadata))
