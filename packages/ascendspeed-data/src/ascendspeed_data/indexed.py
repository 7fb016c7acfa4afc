"""Megatron's indexed dataset: tokens in a `.bin`, where each document lies in an `.idx`.

Layout of the `.idx`, little-endian, as megatron-core's `IndexedDatasetBuilder` writes it:

    9 bytes   magic "MMIDIDX\\x00\\x00"
    uint64    version, 1
    uint8     code of the token format
    uint64    number of sequences, n
    uint64    number of document boundaries, m
    int32[n]  tokens of each sequence
    int64[n]  byte at which each sequence starts in the .bin
    int64[m]  sequence at which each document starts; the first is 0, the last is n
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.errors import DataError
from ascendspeed_data.files import INCOMPLETE

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
FORMATS: dict[int, Any] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}


def smallest_format(vocab_size: int) -> Any:
    """Return the format in which megatron-core stores ids below `vocab_size`."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclass(frozen=True)
class IndexedDatasetInfo:
    """What a pair of files holds."""

    num_sequences: int
    num_documents: int
    num_tokens: int
    format: str
    num_bytes: int


class IndexedDatasetWriter:
    """Write a pair, document by document; it gets its name only when all of it is on the disk.

    Args:
        prefix: path without `.bin`.
        token_format: numpy integer type of the ids.
    """

    def __init__(self, prefix: Path, token_format: Any) -> None:
        self.prefix = prefix
        self._format = np.dtype(token_format)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin_path = _with_suffix(prefix, ".bin" + INCOMPLETE)
        self._bin = self._bin_path.open("wb")
        self._lengths: list[NDArray[np.int32]] = []

    def add_documents(self, lengths: Sequence[int], tokens: NDArray[Any]) -> None:
        """Append documents of one sequence each.

        Args:
            lengths: tokens of each document.
            tokens: ids of all of them, one after the other.
        """
        assert sum(lengths) == len(tokens)
        self._bin.write(tokens.astype(self._format, copy=False).tobytes())
        self._lengths.append(np.asarray(lengths, dtype=np.int32))

    def finish(self) -> None:
        """Write the index, and give both files their names."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
        starts = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self._format.itemsize, out=starts[1:])
        code = next(code for code, known in FORMATS.items() if np.dtype(known) == self._format)
        idx_path = _with_suffix(self.prefix, ".idx" + INCOMPLETE)
        with idx_path.open("wb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(starts.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
            _to_disk(file)
        _to_disk(self._bin)
        self._bin.close()
        self._bin_path.replace(_with_suffix(self.prefix, ".bin"))
        idx_path.replace(_with_suffix(self.prefix, ".idx"))

    def __enter__(self) -> "IndexedDatasetWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        self._bin_path.unlink(missing_ok=True)


class IndexedDataset:
    """Read a pair; the tokens stay on the disk until they are asked for.

    Args:
        prefix: path without `.bin`.

    Raises:
        DataError: a file is missing or damaged.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._format, self.lengths, self._starts, self.documents = _read_index(prefix)
        bin_path = _existing(prefix, ".bin")
        size = bin_path.stat().st_size
        _check_pointers(prefix, self._format, self.lengths, self._starts, size)
        self._tokens: NDArray[Any] = (
            np.memmap(bin_path, dtype=self._format, mode="r") if size else np.empty(0, self._format)
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> NDArray[Any]:
        """Return the ids of one sequence."""
        start = int(self._starts[number]) // self._format.itemsize
        return self._tokens[start : start + int(self.lengths[number])]

    @property
    def info(self) -> IndexedDatasetInfo:
        """Counts and format."""
        return IndexedDatasetInfo(
            num_sequences=len(self.lengths),
            num_documents=len(self.documents) - 1,
            num_tokens=int(self.lengths.sum(dtype=np.int64)),
            format=self._format.name,
            num_bytes=self._tokens.nbytes,
        )


def _read_index(prefix: Path) -> tuple[np.dtype[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    path = _existing(prefix, ".idx")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or head[:9] != MAGIC:
        raise DataError(
            f"{path} is not an index of an indexed dataset (its first bytes are {head[:9]!r}); make it again"
        )
    _, version, code, sequences, boundaries = HEADER.unpack(head)
    if version != VERSION or code not in FORMATS:
        raise DataError(
            f"{path}: version={version}, format code={code}; only version 1 with {list(FORMATS)} is read"
        )
    expected = HEADER.size + sequences * (4 + 8) + boundaries * 8
    if size != expected:
        raise DataError(
            f"{path} has {size} bytes, its counts ({sequences} sequences, {boundaries} document boundaries) need "
            f"{expected}; it was cut short or altered: make it again"
        )
    content = (
        np.memmap(path, mode="r", offset=HEADER.size) if expected > HEADER.size else np.empty(0, np.uint8)
    )
    lengths = content[: 4 * sequences].view(np.int32)
    starts = content[4 * sequences : 12 * sequences].view(np.int64)
    documents = content[12 * sequences :].view(np.int64)
    if boundaries < 1 or documents[0] != 0 or documents[-1] != sequences or np.any(np.diff(documents) < 0):
        raise DataError(f"{path}: document boundaries do not rise from 0 to {sequences}; make it again")
    return np.dtype(FORMATS[code]), lengths, starts, documents


def _check_pointers(
    prefix: Path, token_format: np.dtype[Any], lengths: NDArray[Any], starts: NDArray[Any], size: int
) -> None:
    if len(lengths) == 0:
        return
    ends = starts + lengths.astype(np.int64) * token_format.itemsize
    bad = np.flatnonzero((lengths < 0) | (starts < 0) | (ends > size) | (starts % token_format.itemsize != 0))
    if len(bad):
        number = int(bad[0])
        raise DataError(
            f"{prefix}.idx: sequence {number} ({int(lengths[number])} tokens at byte {int(starts[number])}) lies "
            f"outside {prefix}.bin, which has {size} bytes; the .bin was cut short, or the two do not belong together"
        )


def _existing(prefix: Path, suffix: str) -> Path:
    path = _with_suffix(prefix, suffix)
    if not path.is_file():
        stripped = str(prefix).removesuffix(".bin").removesuffix(".idx")
        hint = (
            f"give the prefix without the ending: {stripped}"
            if stripped != str(prefix)
            else "check the prefix"
        )
        raise DataError(f"{path} does not exist; {hint}")
    return path


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
