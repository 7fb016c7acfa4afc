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
class Room:
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
    """

    def __init__(
        self,
        num_layers: int,
        num_key_value_heads: int,
        capacity_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = blocks_of(capacity_tokens)
        shape = (num_layers, num_key_value_heads, self.num_blocks * BLOCK_TOKENS, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self._rooms: list[Room] = []
        self.free_blocks = self.num_blocks

    def reserve(self, tokens: int) -> Room:
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
        room = Room(first_block, wanted)
        self._rooms.insert(number, room)
        self.free_blocks -= wanted
        return room

    def release(self, room: Room) -> None:
        """Give a room back."""
        self._rooms.remove(room)
        self.free_blocks += room.num_blocks

    def copy(self, source: Room, target: Room, start: int, end: int) -> None:
        """Copy the keys and values of tokens `start` to `end` of a text into the room of another."""
        for whole in (self.keys, self.values):
            there = whole[:, :, target.start + start : target.start + end]
            there.copy_(whole[:, :, source.start + start : source.start + end])

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
class Piece:
    """Tokens of one text that a pass runs.

    Attributes:
        room: of the text.
        start: place of the first of them in the text; what is before lies in the room.
        count: how many, all of which have room.
    """

    room: Room
    start: int
    count: int

    @property
    def end(self) -> int:
        """Place after the last of them."""
        return self.start + self.count


class CachedPass:
    """One pass of a model over pieces of texts, laid one after the other: [1, M] tokens.

    Linear layers see all of them at once, attention sees piece after piece, each with its own text. In every layer a
    piece's keys and values are stored and then attended to before those of the next, so that several pieces may use
    one room: what they have in common lies before them, and what each adds is gone after.

    Args:
        cache: where keys and values lie.
        pieces: in order.
        length: M, if more than the pieces hold; the rest is padding that nobody reads.
    """

    def __init__(self, cache: KeyValueCache, pieces: Sequence[Piece], length: int | None = None) -> None:
        self.pieces = tuple(pieces)
        used = sum(piece.count for piece in pieces)
        self.length = used if length is None else length
        self._cache = cache
        places = [place for piece in pieces for place in range(piece.start, piece.end)]
        padding = [0] * (self.length - used)
        self.positions = torch.tensor([places + padding], device=cache.keys.device)
        """Place of each token in its text, [1, M]."""
        self._rows: torch.Tensor | None = None
        rooms = [piece.room.start for piece in pieces]
        # Several single tokens are stored at once, if none lies where another of them is looked for.
        if len(pieces) > 1 and all(piece.count == 1 for piece in pieces) and len(set(rooms)) == len(rooms):
            rows = [piece.room.start + piece.start for piece in pieces]
            self._rows = torch.tensor(rows, device=cache.keys.device)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
        masks: Sequence[torch.Tensor | None],
        window: int | None,
    ) -> torch.Tensor:
        """Store the keys and values of every piece, and attend to its text.

        Args:
            layer: place of the layer in the cache.
            q: [1, M, N, D].
            k: [1, M, K, D].
            v: [1, M, K, D].
            attend: attention of one text, see `attention.causal_attention`.
            masks: of each piece, over the keys that `first_key` leaves.
            window: keys that a query sees.

        Returns:
            [1, M, N, D].
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if self._rows is not None:
            used = len(self.pieces)
            keys.index_copy_(1, self._rows, k[0, :used].transpose(0, 1))
            values.index_copy_(1, self._rows, v[0, :used].transpose(0, 1))
        parts, done = [], 0
        for piece, mask in zip(self.pieces, masks, strict=True):
            here, done = slice(done, done + piece.count), done + piece.count
            base = piece.room.start
            if self._rows is None:
                keys[:, base + piece.start : base + piece.end] = k[0, here].transpose(0, 1)
                values[:, base + piece.start : base + piece.end] = v[0, here].transpose(0, 1)
            seen = slice(base + first_key(piece, window), base + piece.end)
            query = q[:, here].transpose(1, 2)
            parts.append(attend(query, keys[None, :, seen], values[None, :, seen], mask).transpose(1, 2))
        if done < self.length:
            parts.append(q.new_zeros(1, self.length - done, *q.shape[2:]))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def first_key(piece: Piece, window: int | None) -> int:
    """Return the first place of its text that any token of a piece sees."""
    return 0 if window is None else max(piece.start - window + 1, 0)
