"""Read tensors slab by slab, a few rows at a time, so that memory does not grow with the model."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from ascendspeed_core.weights.source import CheckpointError, Index, ReadableTensor, TensorInfo

SLAB_BYTES = 1 << 21
"""Most bytes of a tensor that are in memory at once, unless one row is larger."""


class SliceReader(Protocol):
    """Tensors by name, readable by slice."""

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return shape and dtype of each by name."""
        ...

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a tensor or a slice of it."""
        ...


def slabs(
    source: SliceReader, name: str, index: Index, dtype: torch.dtype | None = None
) -> Iterator[torch.Tensor]:
    """Yield part of a tensor as contiguous runs of its rows, converted to `dtype` if it is given.

    Args:
        source: holds it.
        name: of the tensor.
        index: the part.
        dtype: of the slabs; by default the stored one.

    Raises:
        CheckpointError: a number is too large for the dtype.
    """
    if not index:
        yield as_format(source.read(name), dtype, name).contiguous()
        return
    first, rest = index[0], index[1:]
    width = 1
    for part in rest:
        width *= part.stop - part.start
    itemsize = source.tensors()[name].dtype.itemsize
    rows = max(SLAB_BYTES // max(width * itemsize, 1), 1)
    for start in range(first.start, first.stop, rows):
        slab = source.read(name, (slice(start, min(start + rows, first.stop)), *rest))
        yield as_format(slab, dtype, name).contiguous()


def as_format(tensor: torch.Tensor, dtype: torch.dtype | None, name: str) -> torch.Tensor:
    """Convert a tensor to a dtype.

    Raises:
        CheckpointError: a finite number becomes infinite.
    """
    if dtype is None or tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and bool(
        (converted.isinf() & tensor.isfinite()).any()
    ):
        raise CheckpointError(
            f"{name} holds numbers up to {float(tensor.abs().max()):.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; choose bfloat16 or float32"
        )
    return converted


def equal_tensors(a: ReadableTensor, b: ReadableTensor) -> bool:
    """Tell whether two stored tensors hold the same numbers; both are read, as far as they are equal."""
    return a == b or first_different_row(a, b) is None


def first_different_row(a: ReadableTensor, b: ReadableTensor) -> int | None:
    """Return the number of the first row in which two stored tensors differ, `None` when they are equal."""
    shape = a.info.shape
    if shape != b.info.shape:
        return 0
    if not shape:
        return None if _same_numbers(a.read(), b.read()) else 0
    rows = max(SLAB_BYTES // max(a.info.num_bytes // max(shape[0], 1), 1), 1)
    for start in range(0, shape[0], rows):
        part = (slice(start, min(start + rows, shape[0])), *(slice(0, length) for length in shape[1:]))
        first, second = a.read(part), b.read(part)
        if not _same_numbers(first, second):
            same = [_same_numbers(x, y) for x, y in zip(first, second, strict=True)]
            return start + same.index(False)
    return None


def _same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare values, whatever format they have; not-a-number at the same place is no difference."""
    if a.dtype == b.dtype and torch.equal(_flat_bytes(a), _flat_bytes(b)):
        return True
    x, y = a.double(), b.double()
    return bool(((x == y) | (x.isnan() & y.isnan())).all())


def _flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return flat.cast("B")


def write_all(file: object, data: memoryview) -> None:
    """Write bytes to an unbuffered file, which may take less than it is given."""
    written = 0
    while written < len(data):
        written += file.write(data[written:])  # type: ignore[attr-defined]
