"""What attention keeps of the tokens seen so far, for decoding.

All sequences share one preallocated piece of memory. Each has a slot in it, reserved for the longest that it can
become, in which what is kept of its tokens lies in order: attention reads it where it is, without a copy. Slots are
counted in blocks. When the free blocks would do but are scattered, slots move together.

What is kept is up to the attention of each layer: keys and values in most, something else in others (one latent for
both, say). Layers that keep the same share one tensor, so that the views of a chunk are made for all of them at once.

Shapes: L layers of this rank, K key-value heads of this rank, C capacity in tokens, D head size, M tokens of a pass, N
query heads of this rank, T tokens attended to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from ascendspeed_core.kernels.lengths import LengthsAttention
from ascendspeed_core.kernels.single_tokens import TokenAttention
from ascendspeed_data.errors import AscendSpeedError

BLOCK_TOKENS = 16
"""Slots are reserved in blocks of this size."""


@dataclass(frozen=True)
class LayerCache:
    """What the attention of one layer keeps.

    Attributes:
        shapes: of each thing that is kept of one token, [D] or [K, D]; for keys and values ((K, D), (K, D)).
        window: tokens that a query sees, its own included; `None` for all.
    """

    shapes: tuple[tuple[int, ...], ...]
    window: int | None = None

    @property
    def elements_per_token(self) -> int:
        """How many numbers are kept of one token."""
        return sum(prod(shape) for shape in self.shapes)


@dataclass(eq=False)
class CacheSlot:
    """The part of the cache that belongs to one sequence.

    Attributes:
        first_block: where it begins; changes when slots move together.
        num_blocks: how long it is; changes when it grows.
    """

    first_block: int
    num_blocks: int

    @property
    def start(self) -> int:
        """First token in the cache."""
        return self.first_block * BLOCK_TOKENS

    @property
    def tokens(self) -> int:
        """How many tokens fit."""
        return self.num_blocks * BLOCK_TOKENS


@dataclass(frozen=True)
class _LayerGroup:
    """Layers that keep the same.

    Attributes:
        layers: their indexes in the cache.
        window: see `LayerCache`.
        tensors: one for each thing that is kept, [L, ..., C, D].
    """

    layers: tuple[int, ...]
    window: int | None
    tensors: tuple[torch.Tensor, ...]


class KeyValueCache:
    """Preallocated memory for what every layer keeps.

    Args:
        layers: what each layer keeps, in order.
        capacity_tokens: C, of all sequences together; rounded up to whole blocks.
        dtype: of what is kept.
        device: where it is kept.
        lengths_attention: attends to keys and values of all chunks of a pass in one call; `None` where each chunk
            needs a call of its own.
        token_attention: stores and attends for all chunks of one token in one call; `None` likewise.

    Attributes:
        layers: tensors of each layer, one for each thing that it keeps, [..., C, D]; keys and values are [K, C, D].
        windows: of each layer, see `LayerCache`.
    """

    def __init__(
        self,
        layers: Sequence[LayerCache],
        capacity_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        lengths_attention: LengthsAttention | None = None,
        token_attention: TokenAttention | None = None,
    ) -> None:
        self.device = device
        self.lengths_attention, self.token_attention = lengths_attention, token_attention
        self.windows = [layer.window for layer in layers]
        self.num_blocks = self.free_blocks = blocks_of(capacity_tokens)
        self.groups: list[_LayerGroup] = []
        by_index: dict[int, tuple[torch.Tensor, ...]] = {}
        for kind in dict.fromkeys(layers):
            indexes = tuple(index for index, layer in enumerate(layers) if layer == kind)
            shapes = [
                (len(indexes), *shape[:-1], self.num_blocks * BLOCK_TOKENS, shape[-1])
                for shape in kind.shapes
            ]
            tensors = tuple(torch.empty(shape, dtype=dtype, device=device) for shape in shapes)
            self.groups.append(_LayerGroup(indexes, kind.window, tensors))
            by_index |= dict(zip(indexes, zip(*tensors, strict=True), strict=True))
        self.layers = [by_index[index] for index in range(len(layers))]
        self._slots: list[CacheSlot] = []

    def reserve(self, tokens: int) -> CacheSlot:
        """Reserve a slot for a sequence of at most `tokens` tokens; what it holds is undefined.

        Raises:
            AscendSpeedError: not enough free blocks; check `free_blocks` before.
        """
        wanted = blocks_of(tokens)
        if wanted > self.free_blocks:
            raise AscendSpeedError(
                f"{tokens} tokens need {wanted} blocks of the key-value cache, of which {self.free_blocks} are free; "
                "release slots first, or make the cache larger"
            )
        gap = self._gap(wanted)
        if gap is None:
            self._move_together()
            gap = self._gap(wanted)
            assert gap is not None
        number, first_block = gap
        slot = CacheSlot(first_block, wanted)
        self._slots.insert(number, slot)
        self.free_blocks -= wanted
        return slot

    def release(self, slot: CacheSlot) -> None:
        """Give a slot back."""
        self._slots.remove(slot)
        self.free_blocks += slot.num_blocks

    def grow(self, slot: CacheSlot, tokens: int) -> None:
        """Make a slot longer; what it holds stays.

        Raises:
            AscendSpeedError: not enough free blocks; check `free_blocks` before.
        """
        wanted = blocks_of(tokens)
        more = wanted - slot.num_blocks
        if more > self.free_blocks:
            raise AscendSpeedError(
                f"{more} more blocks of the key-value cache are needed, of which {self.free_blocks} are free; release "
                "slots first, or make the cache larger"
            )
        number = self._slots.index(slot)
        behind = self._slots[number + 1 :]
        if (behind[0].first_block if behind else self.num_blocks) - slot.first_block < wanted:
            self._move_together()
            for one in reversed(behind):
                self._move(one, one.first_block + more)
        slot.num_blocks = wanted
        self.free_blocks -= more

    def copy(self, source: CacheSlot, target: CacheSlot, start: int, end: int) -> None:
        """Copy what is kept of tokens `start` to `end` of a sequence into the slot of another."""
        for group in self.groups:
            for whole in group.tensors:
                there = whole.narrow(-2, target.start + start, end - start)
                there.copy_(whole.narrow(-2, source.start + start, end - start))

    def _gap(self, wanted: int) -> tuple[int, int] | None:
        """Return the number among slots and the first block of the first gap that is long enough."""
        start = 0
        for number, slot in enumerate(self._slots):
            if slot.first_block - start >= wanted:
                return number, start
            start = slot.first_block + slot.num_blocks
        return (len(self._slots), start) if self.num_blocks - start >= wanted else None

    def _move_together(self) -> None:
        """Move every slot down to the end of the one before."""
        start = 0
        for slot in self._slots:
            self._move(slot, start)
            start += slot.num_blocks

    def _move(self, slot: CacheSlot, first_block: int) -> None:
        if slot.first_block != first_block:
            for whole in (tensor for layer in self.layers for tensor in layer):
                # The two may overlap.
                moved = whole.narrow(-2, slot.start, slot.tokens).clone()
                whole.narrow(-2, first_block * BLOCK_TOKENS, slot.tokens).copy_(moved)
            slot.first_block = first_block


def blocks_of(tokens: int) -> int:
    """Return how many blocks hold a number of tokens."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass(frozen=True)
class SequenceChunk:
    """Tokens of one sequence that a pass computes.

    Attributes:
        slot: of the sequence.
        start: position of the first of them; what is kept of the tokens before lies in the slot.
        count: how many, all of which fit into the slot.
    """

    slot: CacheSlot
    start: int
    count: int

    @property
    def end(self) -> int:
        """Position after the last of them."""
        return self.start + self.count

    def first_visible(self, window: int | None) -> int:
        """Return the first position that any of the tokens sees."""
        return 0 if window is None else max(self.start - window + 1, 0)

    def tile(self, tile_tokens: int) -> "SequenceChunk":
        """Return the tile, from a multiple of `tile_tokens` to the next, that the chunk is a part of."""
        start = self.start // tile_tokens * tile_tokens
        assert self.end <= start + tile_tokens <= self.slot.tokens
        return SequenceChunk(self.slot, start, tile_tokens)
