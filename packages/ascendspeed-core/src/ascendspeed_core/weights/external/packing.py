"""How a stored tensor is put together from slices of logical tensors.

A stored tensor is a list of slices along its first dimension. Packing (queries, keys and values of each head one
after the other; gate above up) and cutting (rows or columns for each tensor-parallel rank) are operations on such
lists, so that the same description serves reading and writing.

Example: two heads of size D with their queries, keys and values packed are six slices of D rows each; cut over two
ranks by rows, the first rank holds the first three.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from ascendspeed_core.weights.source import CheckpointError, Index


@dataclass(frozen=True)
class PackedSlice:
    """Consecutive rows of a stored tensor that are a slice of one logical tensor, or padding.

    Attributes:
        name: of the logical tensor.
        index: the slice; for padding the one row that is repeated.
        repeats: for padding how many rows; 0 for a slice.
        stack: position in the leading dimensions of the logical tensor, when `index` is of one of its members only.
    """

    name: str
    index: Index
    repeats: int = 0
    stack: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows that it takes in the stored tensor."""
        return self.repeats or self.index[0].stop - self.index[0].start

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the stored tensor."""
        return (self.rows, *(part.stop - part.start for part in self.index[1:]))

    @property
    def logical_index(self) -> Index:
        """The slice in all dimensions of the logical tensor."""
        return (*(slice(at, at + 1) for at in self.stack), *self.index)


class Cut(Enum):
    """What tensor-parallel ranks hold of a stored tensor."""

    WHOLE = "whole"
    """All of it, every rank."""
    ROWS = "rows"
    COLUMNS = "columns"


@dataclass(frozen=True)
class PackedTensor:
    """One stored tensor, as slices of logical tensors.

    Attributes:
        key: its name in the file.
        parts: lists of slices. Each list is cut by itself, and a rank's parts stand one after the other.
        cut: along which dimension tensor-parallel ranks cut it.
        leading: leading dimensions of a fused tensor: its rows are those of its matrices, one after the other.
        transposed: each matrix is stored as the transpose of what the slices make.
    """

    key: str
    parts: tuple[tuple[PackedSlice, ...], ...]
    cut: Cut = Cut.WHOLE
    leading: tuple[int, ...] = ()
    transposed: bool = False

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
        return tuple(piece for part in self.parts for piece in part)

    @property
    def matrix_rows(self) -> int:
        """Rows of each matrix, before it is transposed."""
        return sum(piece.rows for piece in self.slices) // prod(self.leading)

    @property
    def is_swapped(self) -> bool:
        """Whether its matrices are stored transposed; vectors never are."""
        return self.transposed and len(self.slices[0].index) == 2

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stored tensor."""
        matrix = (self.matrix_rows, *self.slices[0].shape[1:])
        return (*self.leading, *(reversed(matrix) if self.is_swapped else matrix))

    def position(self, row: int) -> tuple[int, ...]:
        """Return the position in the leading dimensions of the matrix that holds a row."""
        matrix, found = row // self.matrix_rows, []
        for length in reversed(self.leading):
            found.append(matrix % length)
            matrix //= length
        return tuple(reversed(found))


def whole(name: str, shape: Sequence[int], stack: tuple[int, ...] = ()) -> PackedSlice:
    """Return the slice that is a whole tensor, or a whole member of a stack."""
    return PackedSlice(name, tuple(slice(0, length) for length in shape), stack=stack)


def padded(name: str, shape: Sequence[int], rows: int) -> tuple[PackedSlice, ...]:
    """Return a whole tensor, padded to `rows` by repeating its last row, as Megatron-LM's converters do."""
    last = (slice(shape[0] - 1, shape[0]), *(slice(0, length) for length in shape[1:]))
    padding = (PackedSlice(name, last, rows - shape[0]),) if rows > shape[0] else ()
    return (whole(name, shape), *padding)


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
    """Yield what a rank holds of the rows."""
    total = sum(piece.rows for piece in slices)
    _check_divides(key, "rows", total, tp)
    start, stop = rank * total // tp, (rank + 1) * total // tp
    before = 0
    for piece in slices:
        first, last = max(start - before, 0), min(stop - before, piece.rows)
        before += piece.rows
        if first >= last:
            continue
        if piece.repeats:
            yield replace(piece, repeats=last - first)
        else:
            offset = piece.index[0].start
            yield replace(piece, index=(slice(offset + first, offset + last), *piece.index[1:]))


def cut_columns(key: str, slices: Sequence[PackedSlice], rank: int, tp: int) -> Iterator[PackedSlice]:
    """Yield what a rank holds of the columns of every slice."""
    for piece in slices:
        columns = piece.index[1]
        width = columns.stop - columns.start
        _check_divides(key, "columns", width, tp)
        start = columns.start + rank * width // tp
        yield replace(piece, index=(piece.index[0], slice(start, start + width // tp), *piece.index[2:]))


def _check_divides(key: str, what: str, length: int, tp: int) -> None:
    if length % tp:
        raise CheckpointError(
            f"{key} has {length} {what}, which tensor_model_parallel_size={tp} does not divide; choose another size"
        )
