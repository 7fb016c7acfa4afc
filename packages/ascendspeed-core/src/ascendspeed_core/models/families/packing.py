"""Tensors of a Hugging Face folder that hold the rows of several of our tensors; pure arithmetic."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ascendspeed_core.config.model import ModelConfig


@dataclass(frozen=True)
class RowRun:
    """Consecutive rows of one part in a packed tensor.

    Attributes:
        part: which of the packed tensors the rows belong to.
        start: first of them in our tensor.
        rows: how many.
        offset: first of them in the packed tensor.
    """

    part: int
    start: int
    rows: int
    offset: int


class RowPacking(ABC):
    """Which rows of a packed tensor are ours.

    `packed_rows` is always the number of rows of the packed tensor.

    Attributes:
        part: which of the packed tensors ours is.
    """

    part: int

    @abstractmethod
    def runs(self, config: ModelConfig, packed_rows: int) -> Iterator[RowRun]:
        """Yield the rows of all parts from the first row of the packed tensor to the last."""

    def num_rows(self, config: ModelConfig, packed_rows: int) -> int:
        """Return how many rows our tensor has."""
        return sum(run.rows for run in self.runs(config, packed_rows) if run.part == self.part)

    def packed_slices(self, config: ModelConfig, packed_rows: int, rows: slice) -> Iterator[slice]:
        """Yield which rows of the packed tensor hold these rows of ours, in our order; steps may be above 1."""
        for run in self.runs(config, packed_rows):
            first, last = max(rows.start, run.start), min(rows.stop, run.start + run.rows)
            if run.part == self.part and first < last:
                yield slice(run.offset + first - run.start, run.offset + last - run.start)

    def unpacked_slices(
        self, config: ModelConfig, packed_rows: int, rows: slice
    ) -> Iterator[tuple[int, slice, slice]]:
        """Yield part, rows of that part, and where among these rows of the packed tensor they stand."""
        for run in self.runs(config, packed_rows):
            first, last = max(rows.start, run.offset), min(rows.stop, run.offset + run.rows)
            if first < last:
                yield (
                    run.part,
                    slice(run.start + first - run.offset, run.start + last - run.offset),
                    slice(first - rows.start, last - rows.start),
                )


@dataclass(frozen=True)
class Packed(RowPacking):
    """Our tensor is one part of a packed query-key-value projection.

    Attributes:
        part: 0 queries, 1 keys, 2 values.
        order: `stacked`, all queries, all keys, all values (Baichuan's `W_pack`); or `by_head`, for each key-value
            head its query heads, its key and its value (Bloom's `query_key_value`).
    """

    part: int
    order: Literal["stacked", "by_head"]

    def runs(self, config: ModelConfig, packed_rows: int) -> Iterator[RowRun]:
        """Yield the rows of all parts; their sizes follow from the heads, whatever `packed_rows` is."""
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        groups = keys if self.order == "by_head" else 1
        size, offset = config.head_dim, 0
        for group in range(groups):
            for part, heads in enumerate((queries // groups, keys // groups, keys // groups)):
                rows = heads * size
                yield RowRun(part, group * rows, rows, offset)
                offset += rows


@dataclass(frozen=True)
class EqualParts(RowPacking):
    """Our tensor is one of several of equal size, stacked by rows, such as gate above up in `gate_up_proj`.

    Attributes:
        part: 0 for the first.
        count: how many there are.
    """

    part: int
    count: int = 2

    def runs(self, config: ModelConfig, packed_rows: int) -> Iterator[RowRun]:
        """Yield the rows of all parts."""
        rows = packed_rows // self.count
        for part in range(self.count):
            yield RowRun(part, 0, rows, part * rows)


@dataclass(frozen=True)
class Alternating(RowPacking):
    """Our tensor is one of several of equal size, whose rows take turns: the first of each, the second of each.

    Attributes:
        part: 0 for the first.
        count: how many there are.
    """

    part: int
    count: int = 2

    def runs(self, config: ModelConfig, packed_rows: int) -> Iterator[RowRun]:
        """Yield the rows of all parts."""
        for row in range(packed_rows - packed_rows % self.count):
            yield RowRun(row % self.count, row // self.count, 1, row)

    def packed_slices(self, config: ModelConfig, packed_rows: int, rows: slice) -> Iterator[slice]:
        """Yield one slice with steps."""
        if rows.start < rows.stop:
            first, last = (row * self.count + self.part for row in (rows.start, rows.stop - 1))
            yield slice(first, last + 1, self.count)

    def unpacked_slices(
        self, config: ModelConfig, packed_rows: int, rows: slice
    ) -> Iterator[tuple[int, slice, slice]]:
        """Yield each part once."""
        for part in range(self.count):
            first, last = (-(-(row - part) // self.count) for row in (rows.start, rows.stop))
            if first < last:
                yield (
                    part,
                    slice(first, last),
                    slice(first * self.count + part - rows.start, None, self.count),
                )
