"""Write tensors in the files of torch's distributed checkpoint (DCP), as many processes and pieces as there are.

Each process writes one file, blobs of `torch.save` one after the other; one of them then writes `.metadata`, the
pickled table of where each piece lies. DCP's own writer wants all tensors of a process at once, and knows only cuts
that a DTensor can express; what is written here is read by it and by `weights.native` alike.
"""

import os
import pickle
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ascendspeed_core.parallel.slices import Slice
from ascendspeed_data.files import write_durably


@dataclass(frozen=True)
class StoredPiece:
    """Where a piece of a tensor lies.

    Attributes:
        name: of the tensor.
        part: which piece it is.
        dtype: of its numbers.
        file: name of the file in the folder.
        start: first byte.
        length: bytes.
    """

    name: str
    part: Slice
    dtype: torch.dtype
    file: str
    start: int
    length: int


class TensorFile:
    """The file of one process, written from its start to its end.

    Args:
        folder: an existing folder.
        rank: number of the process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.pieces: list[StoredPiece] = []
        self._path = folder / f"__{rank}_0.distcp"
        self._file = self._path.open("wb")

    def add(self, name: str, tensor: torch.Tensor, part: Slice | None = None) -> None:
        """Append a piece, or a whole tensor."""
        whole = Slice(tuple(tensor.shape), tuple(slice(0, length) for length in tensor.shape))
        start = self._file.tell()
        stream = _Stream(self._file)
        tensor = tensor.detach()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            # A view would be saved with all of the storage that it looks at.
            tensor = tensor.clone()
        try:
            torch.save(tensor, stream)  # type: ignore[arg-type] # all that it needs
        except RuntimeError as error:
            raise stream.error or error from None
        length = self._file.tell() - start
        self.pieces.append(StoredPiece(name, part or whole, tensor.dtype, self._path.name, start, length))

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *error: object) -> None:
        """Bring the bytes to the disk and close the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class _Stream:
    """A file for `torch.save`, which would hide why a write failed."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_metadata(folder: Path, pieces: Iterable[StoredPiece]) -> None:
    """Write the table of all pieces of all processes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, Any] = {}
    places = {}
    for piece in pieces:
        offsets = torch.Size(piece.part.offsets)
        entry = tensors.setdefault(
            piece.name,
            TensorStorageMetadata(
                properties=TensorProperties(dtype=piece.dtype), size=torch.Size(piece.part.shape), chunks=[]
            ),
        )
        places[MetadataIndex(piece.name, offsets, len(entry.chunks))] = _StorageInfo(
            piece.file, piece.start, piece.length
        )
        entry.chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece.part.sizes)))
    metadata = Metadata(
        state_dict_metadata=tensors, planner_data={name: (name,) for name in tensors}, storage_data=places
    )
    write_durably(folder / ".metadata", pickle.dumps(metadata))
