"""What attention keeps of the tokens seen so far, for decoding; and one pass over chunks of several sequences.

All sequences share one preallocated piece of memory. Each has a slot in it, reserved for the longest that it can
become, in which what is kept of its tokens lies in order: attention reads it where it is, without a copy. Slots are
counted in blocks. When the free blocks would do but are scattered, slots move together.

What is kept is up to the attention of each layer: keys and values in most, something else in others (one latent for
both, say). Layers that keep the same share one tensor, so that the views of a chunk are made for all of them at once.

Shapes: L layers of this rank, K key-value heads of this rank, C capacity in tokens, D head size, M tokens of a pass, N
query heads of this rank, T tokens attended to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import torch
import torch.nn.functional as F

from ascendspeed_core.kernels.lengths import LengthsAttention, TextLengths
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
    ) -> None:
        self.device = device
        self.lengths_attention = lengths_attention
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


_ViewsByLayer = Sequence[tuple[torch.Tensor, ...]]
"""For each layer a view of each thing that it keeps, [1, ..., T, D]."""


class CachedPass:
    """One pass of a model over chunks of sequences, concatenated: [1, M] tokens.

    Linear layers see all of them at once; attention sees chunk after chunk, each with its own sequence. Several chunks
    may use one slot: what they have in common lies before them, and what each adds is overwritten by the next. In every
    layer what is kept of a chunk is then stored and attended to before that of the next.

    With tiles, attention computes the whole tile that a chunk is a part of, the rest of it zeros: so its shape, and
    with it the order of its sums, depends on the positions of tokens and not on how a sequence is cut into chunks.

    Args:
        cache: what is kept of earlier tokens.
        chunks: in order.
        length: M, if more than the chunks hold; the rest is padding that nobody reads.
        tile_tokens: size of tiles; each chunk must lie in one, and slots must have room for the whole of it.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        chunks: Sequence[SequenceChunk],
        length: int | None = None,
        tile_tokens: int | None = None,
    ) -> None:
        self.chunks = tuple(chunks)
        self.attended = self.chunks if tile_tokens is None else tuple(one.tile(tile_tokens) for one in chunks)
        """What attention computes: the chunks, or their tiles."""
        self._is_tiled = tile_tokens is not None
        self.cache = cache
        counts = [chunk.count for chunk in chunks]
        used = sum(counts)
        self.length = used if length is None else length
        self._padding = self.length - used
        self._counts = [*counts, self._padding] if self._padding else counts
        positions = [position for chunk in chunks for position in range(chunk.start, chunk.end)]
        self.positions = torch.tensor([positions + [0] * self._padding], device=cache.device)
        """Position of each token in its sequence, [1, M]."""
        self._rows: torch.Tensor | None = None
        self.lengths: TextLengths | None = None
        """Of the chunks, where one call attends to all of them: then nobody needs masks."""
        # Several chunks are stored at once, if none lies where another of them is looked for.
        is_apart = len({chunk.slot.start for chunk in chunks}) == len(chunks)
        # In a pass of fixed length a chunk must not depend on those beside it, as it may in one call.
        is_one_call = cache.lengths_attention is not None and is_apart and length is None
        if is_one_call or (len(chunks) > 1 and is_apart and not self._is_tiled):
            rows = [
                chunk.slot.start + position for chunk in chunks for position in range(chunk.start, chunk.end)
            ]
            self._rows = torch.tensor(rows, device=cache.device)
        if is_one_call:
            self.lengths = lengths_of(chunks, cache.device)
        self._visible: list[_ViewsByLayer] = []
        self._stored: list[_ViewsByLayer] = []

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        kept: Sequence[torch.Tensor],
        attend: Callable[..., torch.Tensor],
        masks: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """Store what is kept of every chunk, and attend to its sequence.

        Args:
            layer: index of the layer in the cache.
            q: [1, M, N, D].
            kept: what the layer keeps of these tokens, in the order of its `LayerCache`; [1, M, K, D] or [1, M, D]
                each.
            attend: attention of one sequence: queries [1, N, S, D], then everything that is kept, [1, K, T, D] or
                [1, T, D], then the mask -> [1, N, S, D].
            masks: of each of `attended`, over the tokens that `SequenceChunk.first_visible` leaves.

        Returns:
            [1, M, N, D].
        """
        if self.lengths is not None:
            return self._attend_at_once(layer, q, kept)
        if not self._visible:
            self._make_views()
        queries = q.transpose(1, 2).split(self._counts, dim=2)
        # Tokens stand before the last dimension: [M, K, D] -> [K, M, D], and [M, D] as it is.
        new = [one[0].transpose(0, -2) for one in kept]
        if self._rows is not None:
            used = len(self._rows)
            for whole, mine in zip(self.cache.layers[layer], new, strict=True):
                whole.index_copy_(-2, self._rows, mine.narrow(-2, 0, used))
        parts, done = [], 0
        for number, chunk in enumerate(self.chunks):
            if self._rows is None:
                for view, mine in zip(self._stored[number][layer], new, strict=True):
                    rest = view.shape[-2] - chunk.count
                    if rest:
                        # Of a tile: what is masked must still be a number.
                        view, after = view.split([chunk.count, rest], dim=-2)
                        after.zero_()
                    view.copy_(mine.narrow(-2, done, chunk.count))
                done += chunk.count
            own, seen = queries[number], self._visible[number][layer]
            parts.append(self._attend_to(number, own, seen, attend, masks[number]))
        if self._padding:
            parts.append(torch.zeros_like(queries[-1]))
        attended = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return attended.transpose(1, 2)

    def _attend_to(
        self,
        number: int,
        q: torch.Tensor,
        seen: tuple[torch.Tensor, ...],
        attend: Callable[..., torch.Tensor],
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend from one chunk, in its tile if there are tiles: [1, N, S, D] -> [1, N, S, D]."""
        chunk, tile = self.chunks[number], self.attended[number]
        if chunk.count == tile.count:
            return attend(q, *seen, mask)
        before = chunk.start - tile.start
        whole = F.pad(q, (0, 0, before, tile.count - before - chunk.count))
        return attend(whole, *seen, mask).narrow(2, before, chunk.count)

    def _attend_at_once(self, layer: int, q: torch.Tensor, kept: Sequence[torch.Tensor]) -> torch.Tensor:
        """Store keys and values of all chunks and attend to them in one call: [1, M, N, D]."""
        assert self.lengths is not None
        assert self._rows is not None
        assert self.cache.lengths_attention is not None
        keys, values = self.cache.layers[layer]
        for whole, mine in zip((keys, values), kept, strict=True):
            whole.index_copy_(-2, self._rows, mine[0].transpose(0, 1))
        window = self.cache.windows[layer]
        return self.cache.lengths_attention(q[0], keys, values, self.lengths, window).unsqueeze(0)

    def _make_views(self) -> None:
        """Make the views of what each chunk sees and stores, of all layers at once: far cheaper than layer by layer."""
        for chunk, attended in zip(self.chunks, self.attended, strict=True):
            self._visible.append(self._views(attended, None))
            if self._rows is None:
                self._stored.append(self._views(attended, chunk.start))

    def _views(self, chunk: SequenceChunk, first_stored: int | None) -> _ViewsByLayer:
        """Return views of what a chunk sees, or of its tokens from `first_stored` on."""
        found: dict[int, tuple[torch.Tensor, ...]] = {}
        for group in self.cache.groups:
            first = chunk.first_visible(group.window) if first_stored is None else first_stored
            start, count = chunk.slot.start + first, chunk.end - first
            views = [whole.narrow(-2, start, count).unsqueeze(1).unbind() for whole in group.tensors]
            by_layer = list(zip(*views, strict=True))
            if len(self.cache.groups) == 1:
                return by_layer
            found |= dict(zip(group.layers, by_layer, strict=True))
        return [found[index] for index in range(len(found))]


class SingleTokenPass(CachedPass):
    """A pass of one more token for each of several texts, by numbers on the device: it can be recorded and replayed.

    Args:
        cache: with an attention for all texts in one call.
        positions: of each token in its text, int64, [M].
        starts: first token of each text's slot, int64, [M].
        most_keys: see `TextLengths`.
    """

    def __init__(
        self, cache: KeyValueCache, positions: torch.Tensor, starts: torch.Tensor, most_keys: int
    ) -> None:
        self.cache, self.chunks, self.length = cache, (), len(positions)
        self.attended, self._is_tiled = (), False
        self.positions = positions.unsqueeze(0)
        self._rows = starts + positions
        self.lengths = TextLengths(
            torch.arange(len(positions) + 1, dtype=torch.int32, device=cache.device),
            torch.cat([starts, starts[-1:]]).to(torch.int32),
            (positions + 1).to(torch.int32),
            1,
            most_keys,
        )


def lengths_of(chunks: Sequence[SequenceChunk], device: torch.device) -> TextLengths:
    """Return where the chunks' queries and keys lie."""
    counts = [chunk.count for chunk in chunks]
    ends = [chunk.end for chunk in chunks]
    firsts = [chunk.slot.start for chunk in chunks]
    numbers = [0, *accumulate(counts), *firsts, firsts[-1], *ends]
    queries, keys, num_keys = torch.tensor(numbers, dtype=torch.int32, device=device).split(
        [len(chunks) + 1, len(chunks) + 1, len(chunks)]
    )
    return TextLengths(queries, keys, num_keys, max(counts), max(ends))
