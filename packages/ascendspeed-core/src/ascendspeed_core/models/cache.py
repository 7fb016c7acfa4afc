"""Keys and values of the tokens seen so far, for decoding; and one pass of a model over pieces of several texts.

All texts share one preallocated piece of memory. Each has a room in it, reserved for the longest that it can become,
in which its keys and values lie one after the other: attention reads them where they are, without a copy. Rooms are
counted in blocks. When the free blocks would do but lie apart, rooms move together.

Shapes: L layers of this device, K key-value heads of this device, C capacity in tokens, D head size, M tokens of a
pass, N query heads of this device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ascendspeed_data.errors import AscendSpeedError

BLOCK_TOKENS = 16
"""Rooms are reserved in blocks of so many tokens."""


@dataclass(eq=False)
class CacheSlot:
    """Where one text's keys and values lie.

    Attributes:
        first_block: where it begins; changes when rooms move together.
        num_blocks: how long it is.
    """

    first_block: int
    num_blocks: int

    @property
    def start(self) -> int:
        """First token in the memory."""
        return self.first_block * BLOCK_TOKENS

    @property
    def tokens(self) -> int:
        """How many tokens have room."""
        return self.num_blocks * BLOCK_TOKENS


class KeyValueCache:
    """Preallocated keys and values of every layer, [L, K, C, D] each.

    Args:
        num_layers: L.
        num_key_value_heads: K.
        capacity_tokens: C, of all texts together; rounded up to whole blocks.
        head_dim: D.
        window: keys that a query sees, its own included; `None` for all.
    """

    def __init__(
        self,
        num_layers: int,
        num_key_value_heads: int,
        capacity_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int | None = None,
    ) -> None:
        self._window = window
        self.num_blocks = blocks_of(capacity_tokens)
        shape = (num_layers, num_key_value_heads, self.num_blocks * BLOCK_TOKENS, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._rooms: list[CacheSlot] = []
        self.free_blocks = self.num_blocks

    def reserve(self, tokens: int) -> CacheSlot:
        """Reserve a room for a text of at most so many tokens; what it holds is undefined.

        Raises:
            AscendSpeedError: not enough free blocks; ask `free_blocks` before.
        """
        wanted = blocks_of(tokens)
        if wanted > self.free_blocks:
            raise AscendSpeedError(
                f"{tokens} tokens need {wanted} blocks of the key-value cache, of which {self.free_blocks} are free; "
                "give back rooms first, or make the cache larger"
            )
        place = self._gap(wanted)
        if place is None:
            self._move_together()
            place = self._gap(wanted)
            assert place is not None
        number, first_block = place
        room = CacheSlot(first_block, wanted)
        self._rooms.insert(number, room)
        self.free_blocks -= wanted
        return room

    def release(self, room: CacheSlot) -> None:
        """Give a room back."""
        self._rooms.remove(room)
        self.free_blocks += room.num_blocks

    def copy(self, source: CacheSlot, target: CacheSlot, start: int, end: int) -> None:
        """Copy the keys and values of tokens `start` to `end` of a text into the room of another."""
        for whole in (self.keys, self.values):
            there = whole[:, :, target.start + start : target.start + end]
            there.copy_(whole[:, :, source.start + start : source.start + end])

    def first_key(self, piece: "SequenceChunk") -> int:
        """Return the first place of its text that any token of a piece sees."""
        return 0 if self._window is None else max(piece.start - self._window + 1, 0)

    def _gap(self, wanted: int) -> tuple[int, int] | None:
        """Return the number among rooms and the first block of the first gap that is long enough."""
        start = 0
        for number, room in enumerate(self._rooms):
            if room.first_block - start >= wanted:
                return number, start
            start = room.first_block + room.num_blocks
        return (len(self._rooms), start) if self.num_blocks - start >= wanted else None

    def _move_together(self) -> None:
        """Move every room down to the end of the one before."""
        start = 0
        for room in self._rooms:
            if room.first_block != start:
                old, new = room.start, start * BLOCK_TOKENS
                for layer in (*self.keys, *self.values):
                    # The two may overlap.
                    layer[:, new : new + room.tokens] = layer[:, old : old + room.tokens].clone()
                room.first_block = start
            start += room.num_blocks


def blocks_of(tokens: int) -> int:
    """Return how many blocks hold so many tokens."""
    return -(-tokens // BLOCK_TOKENS)


@dataclass(frozen=True)
class SequenceChunk:
    """Tokens of one text that a pass runs.

    Attributes:
        room: of the text.
        start: place of the first of them in the text; what is before lies in the room.
        count: how many, all of which have room.
    """

    room: CacheSlot
    start: int
    count: int

    @property
    def end(self) -> int:
        """Place after the last of them."""
        return self.start + self.count


_ByLayer = tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]
"""Keys and values, by layer."""


class CachedPass:
    """One pass of a model over pieces of texts, laid one after the other: [1, M] tokens.

    Linear layers see all of them at once, attention sees piece after piece, each with its own text. Several pieces may
    use one room: what they have in common lies before them, and what each adds is gone after. In every layer a piece's
    keys and values are then stored and attended to before those of the next.

    Args:
        cache: where keys and values lie.
        pieces: in order.
        length: M, if more than the pieces hold; the rest is padding that nobody reads.
    """

    def __init__(
        self, cache: KeyValueCache, pieces: Sequence[SequenceChunk], length: int | None = None
    ) -> None:
        self.pieces = tuple(pieces)
        self.cache = cache
        counts = [piece.count for piece in pieces]
        used = sum(counts)
        self.length = used if length is None else length
        self._padding = self.length - used
        self._counts = [*counts, self._padding] if self._padding else counts
        places = [place for piece in pieces for place in range(piece.start, piece.end)]
        self.positions = torch.tensor([places + [0] * self._padding], device=cache.keys.device)
        """Place of each token in its text, [1, M]."""
        self._rows: torch.Tensor | None = None
        # Several pieces are stored at once, if none lies where another of them is looked for.
        if len(pieces) > 1 and len({piece.room.start for piece in pieces}) == len(pieces):
            rows = [piece.room.start + place for piece in pieces for place in range(piece.start, piece.end)]
            self._rows = torch.tensor(rows, device=cache.keys.device)
        self._seen: list[_ByLayer] = []
        self._stored: list[_ByLayer] = []

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
        masks: Sequence[torch.Tensor | None],
    ) -> torch.Tensor:
        """Store the keys and values of every piece, and attend to its text.

        Args:
            layer: place of the layer in the cache.
            q: [1, M, N, D].
            k: [1, M, K, D].
            v: [1, M, K, D].
            attend: attention of one text, see `attention.causal_attention`.
            masks: of each piece, over the keys that `KeyValueCache.first_key` leaves.

        Returns:
            [1, M, N, D].
        """
        if not self._seen:
            self._find_places()
        queries = q.transpose(1, 2).split(self._counts, dim=2)
        k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)
        if self._rows is not None:
            used = len(self._rows)
            self.cache.keys[layer].index_copy_(1, self._rows, k[:, :used])
            self.cache.values[layer].index_copy_(1, self._rows, v[:, :used])
        parts, done = [], 0
        for number, piece in enumerate(self.pieces):
            if self._rows is None:
                here, done = slice(done, done + piece.count), done + piece.count
                keys, values = self._stored[number]
                keys[layer].copy_(k[:, here])
                values[layer].copy_(v[:, here])
            keys, values = self._seen[number]
            parts.append(attend(queries[number], keys[layer], values[layer], masks[number]))
        if self._padding:
            parts.append(torch.zeros_like(queries[-1]))
        attended = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return attended.transpose(1, 2)

    def _find_places(self) -> None:
        """Make the views of what each piece sees and stores, of all layers at once: far cheaper than layer by layer."""
        keys, values = self.cache.keys, self.cache.values
        for piece in self.pieces:
            base = piece.room.start
            seen = slice(base + self.cache.first_key(piece), base + piece.end)
            self._seen.append((keys[:, None, :, seen].unbind(), values[:, None, :, seen].unbind()))
            if self._rows is None:
                own = slice(base + piece.start, base + piece.end)
                self._stored.append((keys[:, :, own].unbind(), values[:, :, own].unbind()))
