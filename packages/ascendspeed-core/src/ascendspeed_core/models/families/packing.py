"""Tensors of a Hugging Face folder that hold several of ours, rows of one behind rows of another; pure arithmetic."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ascendspeed_core.config.model import ModelConfig

QUERY_KEY_VALUE = 3
"""Tensors that a packed projection holds: part 0 queries, 1 keys, 2 values."""


@dataclass(frozen=True)
class Packed:
    """Which part of a packed query-key-value projection one of our tensors is.

    Attributes:
        part: 0 queries, 1 keys, 2 values.
        order: `stacked`, all queries, all keys, all values (Baichuan's `W_pack`); or `by_head`, for each key-value
            head its query heads, its key and its value (Bloom's `query_key_value`).
    """

    part: int
    order: Literal["stacked", "by_head"]

    def blocks(self, config: ModelConfig) -> Iterator["Block"]:
        """Yield the rows of the packed tensor, whatever part they belong to, from first to last."""
        queries, keys = config.num_attention_heads, config.num_key_value_heads
        groups = keys if self.order == "by_head" else 1
        size, offset = config.head_dim, 0
        for group in range(groups):
            for part, heads in enumerate((queries // groups, keys // groups, keys // groups)):
                rows = heads * size
                yield Block(part, group * rows, rows, offset)
                offset += rows

    def num_rows(self, config: ModelConfig) -> int:
        """Return how many rows our tensor has."""
        return sum(block.rows for block in self.blocks(config) if block.part == self.part)

    def places(self, config: ModelConfig, rows: slice) -> Iterator[slice]:
        """Yield where rows of our tensor lie in the packed one, in order."""
        for block in self.blocks(config):
            first, last = max(rows.start, block.start), min(rows.stop, block.start + block.rows)
            if block.part == self.part and first < last:
                yield slice(block.offset + first - block.start, block.offset + last - block.start)

    def contents(self, config: ModelConfig, rows: slice) -> Iterator[tuple[int, slice]]:
        """Yield of which part, and which rows of it, rows of the packed tensor consist, in order."""
        for block in self.blocks(config):
            first, last = max(rows.start, block.offset), min(rows.stop, block.offset + block.rows)
            if first < last:
                yield block.part, slice(block.start + first - block.offset, block.start + last - block.offset)


@dataclass(frozen=True)
class Block:
    """Rows of one part that lie together.

    Attributes:
        part: whose rows.
        start: first of them in our tensor.
        rows: how many.
        offset: first of them in the packed tensor.
    """

    part: int
    start: int
    rows: int
    offset: int
