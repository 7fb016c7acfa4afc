"""How a stored tensor is put together from parts of logical tensors.

A stored tensor is a list of slices along its first dimension. Packer (queries, keys and values of each head behind
one another; gate above up) and cutting (rows or columns for each tensor-parallel rank) are operations on such lists,
so that one description serves reading and writing.

Example: two heads of size D with their queries, keys and values packed are six slices of D rows each; cut over two
ranks by rows, the first rank holds the first three.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ascendspeed_core.weights.source import CheckpointError, Index


@dataclass(frozen=True)
class PackedSlice:
    """Part of a logical tensor, or filling.

    Attributes:
        name: of the logical tensor.
        index: the part; for filling the one row that is repeated.
        repeats: for filling how many rows; 0 for a part.
    """

    name: str
    index: Index
    repeats: int = 0

    @property
    def rows(self) -> int:
        """Rows that it takes in the stored tensor."""
        return self.repeats or self.index[0].stop - self.index[0].start

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the stored tensor."""
        return (self.rows, *(part.stop - part.start for part in self.index[1:]))


class Cut(Enum):
    """What tensor-parallel ranks hold of a stored tensor."""

    WHOLE = "whole"
    """All of it, every rank."""
    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class PackedTensor:
    """One stored tensor before it is cut.

    Attributes:
        key: its name in the file.
        parts: lists of slices; each is cut by itself, and a rank's parts stand behind one another.
        cut: how.
    """

    key: str
    parts: tuple[tuple[PackedSlice, ...], ...]
    cut: Cut = Cut.WHOLE

    def of_rank(self, rank: int, tp: int) -> "PackedTensor":
        """Return what one tensor-parallel rank holds.

        Raises:
            CheckpointError: the ranks do not divide it.
        """
        if self.cut is Cut.WHOLE or tp == 1:
            return self
        cut = cut_rows if self.cut is Cut.ROWS else cut_columns
        return replace(self, parts=tuple(tuple(cut(self.key, part, rank, tp)) for part in self.parts))

    @property
    def slices(self) -> tuple[PackedSlice, ...]:
        """All slices from the first row to the last."""
        return tuple(block for part in self.parts for block in part)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        return (sum(block.rows for block in self.slices), *self.slices[0].shape[1:])


def whole(name: str, shape: Sequence[int]) -> PackedSlice:
    """Return a block that is a whole tensor."""
    return PackedSlice(name, tuple(slice(0, length) for length in shape))


def padded(name: str, shape: Sequence[int], rows: int) -> tuple[PackedSlice, ...]:
    """Return a whole tensor, filled up to `rows` by repeating its last row, as Megatron-LM's converters do."""
    last = (slice(shape[0] - 1, shape[0]), *(slice(0, length) for length in shape[1:]))
    filling = (PackedSlice(name, last, rows - shape[0]),) if rows > shape[0] else ()
    return (whole(name, shape), *filling)


def interleaved(parts: Iterable[tuple[str, Sequence[int], int]], count: int) -> tuple[PackedSlice, ...]:
    """Return tensors cut into `count` groups of rows each, group by group.

    Args:
        parts: name, shape and rows of one group of each tensor.
        count: groups.
    """
    parts = list(parts)
    return tuple(
        PackedSlice(
            name, (slice(group * rows, (group + 1) * rows), *(slice(0, length) for length in shape[1:]))
        )
        for group in range(count)
        for name, shape, rows in parts
    )


def cut_rows(key: str, slices: Sequence[PackedSlice], rank: int, tp: int) -> Iterator[PackedSlice]:
    """Yield what stands in a rank's share of the rows."""
    total = sum(block.rows for block in slices)
    _check_divides(key, "rows", total, tp)
    start, stop = rank * total // tp, (rank + 1) * total // tp
    before = 0
    for block in slices:
        first, last = max(start - before, 0), min(stop - before, block.rows)
        before += block.rows
        if first >= last:
            continue
        if block.repeats:
            yield replace(block, repeats=last - first)
        else:
            offset = block.index[0].start
            yield replace(block, index=(slice(offset + first, offset + last), *block.index[1:]))


def cut_columns(key: str, slices: Sequence[PackedSlice], rank: int, tp: int) -> Iterator[PackedSlice]:
    """Yield a rank's share of the columns of every block."""
    for block in slices:
        columns = block.index[1]
        width = columns.stop - columns.start
        _check_divides(key, "columns", width, tp)
        start = columns.start + rank * width // tp
        yield replace(block, index=(block.index[0], slice(start, start + width // tp), *block.index[2:]))


def _check_divides(key: str, what: str, length: int, tp: int) -> None:
    if length % tp:
        raise CheckpointError(
            f"{key} has {length} {what}, which tensor_model_parallel_size={tp} does not divide; choose another size"
        )
