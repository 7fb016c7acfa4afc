"""Tensors in files, read by slice into memory of their own.

Files are not mapped: pages of a mapped file count as memory of the process that looked at them, and stay until it
closes the file, so that a model that is loaded from one would be held twice.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ascendspeed_core.weights.source import CheckpointError, Index, TensorInfo

BUFFER_BYTES = 1 << 21
"""What is read at once on its way to another format or order."""

WORTH_A_CALL_BYTES = 1 << 16
"""Reading a row by itself costs as much as reading about this many bytes, so smaller gaps between rows are read too."""


def what_instead(path: Path) -> str | None:
    """Say what a file is that cannot be read as weights, and what to do, where its first bytes tell."""
    try:
        with path.open("rb") as file:
            start = file.read(200)
    except OSError:
        return None
    if start.startswith(b"version https://git-lfs"):
        return (
            "it is a pointer of Git LFS, not the file itself; run git lfs pull, or download the folder again"
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, not the file itself; download it again"
    if start.startswith(b"\x80\x02\x8a\nl"):
        return "it was written by torch before 1.6, whose files are not read; torch.load it, and torch.save it again"
    return None


class StoredFile:
    """A file whose bytes are read by position.

    It is open only while something is read, so that a checkpoint may have more files than a process may open.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size

    def read(self, start: int, length: int) -> torch.Tensor:
        """Return bytes, [length], uint8."""
        found = torch.empty(length, dtype=torch.uint8)
        with self.opened() as file:
            self.read_into(file, found, start)
        return found

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Open the file."""
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read: {error.strerror}; check its permissions"
            ) from None
        try:
            yield file
        finally:
            os.close(file)

    def read_into(self, file: int, memory: torch.Tensor, start: int) -> None:
        """Fill contiguous memory with the bytes that begin at `start`.

        Args:
            file: of `opened`.
            memory: of any format.
            start: first byte.

        Raises:
            CheckpointError: the file ends before.
        """
        # A contiguous tensor of one element may have any stride.
        flat = memory.as_strided((memory.numel(),), (1,)).view(torch.uint8)
        left = flat.numpy().data if memory.numel() else memoryview(b"")
        while left:
            count = os.preadv(file, [left], start)
            if count == 0:
                raise CheckpointError(f"{self.path} is cut short: it ends at byte {start}; copy it again")
            left, start = left[count:], start + count


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file that has not been read.

    Attributes:
        file: where it lies.
        info: its shape and format.
        start: first byte in the file.
        stride: steps between elements along each dimension.
    """

    file: StoredFile
    info: TensorInfo
    start: int
    stride: tuple[int, ...]

    def read(self, index: Index = ()) -> torch.Tensor:
        """Return a copy of the tensor, or of a slice, of which alone the bytes are read, but for small gaps."""
        index = (*index, *(slice(0, length) for length in self.info.shape[len(index) :]))
        shape = [max(part.stop - part.start, 0) for part in index]
        result = torch.empty(shape, dtype=self.info.dtype)
        if result.numel() == 0:
            return result
        first = sum(part.start * step for part, step in zip(index, self.stride, strict=True))
        # The widest steps first: then what lies together in the file is read together.
        order = sorted(range(len(shape)), key=lambda dimension: -self.stride[dimension])
        steps = [self.stride[dimension] for dimension in order]
        with self.file.opened() as file:
            self._fill(file, result.permute(order), first, steps)
        return result

    def _fill(self, file: int, result: torch.Tensor, first: int, steps: Sequence[int]) -> None:
        """Read the elements that are `steps` apart, from number `first` on."""
        start = self.start + first * self.info.dtype.itemsize
        if result.is_contiguous() and _lies_together(result.shape, steps):
            self.file.read_into(file, result, start)
            return
        row = _span(result.shape[1:], steps[1:])
        rows = BUFFER_BYTES // self.info.dtype.itemsize // max(steps[0], 1)
        if rows == 0 or (steps[0] - row) * self.info.dtype.itemsize >= WORTH_A_CALL_BYTES:
            for number in range(result.shape[0]):
                self._fill(file, result[number], first + number * steps[0], steps[1:])
            return
        for number in range(0, result.shape[0], rows):
            part = result[number : number + rows]
            buffer = torch.empty(_span(part.shape, steps), dtype=self.info.dtype)
            self.file.read_into(file, buffer, start + number * steps[0] * self.info.dtype.itemsize)
            part.copy_(buffer.as_strided(part.shape, steps))


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the steps between elements that lie row by row."""
    return tuple(prod(shape[dimension + 1 :]) for dimension in range(len(shape)))


def _span(shape: Sequence[int], steps: Sequence[int]) -> int:
    """Return how many elements lie from the first to the last, gaps included."""
    return 1 + sum((length - 1) * step for length, step in zip(shape, steps, strict=True))


def _lies_together(shape: Sequence[int], steps: Sequence[int]) -> bool:
    dimensions = zip(shape, steps, contiguous_stride(shape), strict=True)
    return all(length == 1 or step == expected for length, step, expected in dimensions)
