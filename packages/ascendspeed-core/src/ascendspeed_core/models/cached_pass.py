"""One pass of a model over chunks of several sequences, with what is kept of the tokens before them.

Shapes are those of `models.cache`, where it is kept.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F

from ascendspeed_core.kernels.lengths import TextLengths
from ascendspeed_core.kernels.single_tokens import SingleTokens
from ascendspeed_core.models.cache import KeyValueCache, SequenceChunk

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
        self._singles: SingleTokens | None = None
        """The chunks of one token, where one call stores and attends for all of them."""
        if cache.token_attention is not None and is_apart and length is None:
            self._singles = single_tokens_of(chunks)
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
        of_singles: Sequence[torch.Tensor] = ()
        if self._singles is not None:
            found = self._attend_from_single_tokens(self._singles, layer, q, kept)
            if len(self._singles.rows) == len(self.chunks):
                return found
            of_singles = found.transpose(1, 2).split(self._counts, dim=2)
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
            if of_singles and chunk.count == 1:
                parts.append(of_singles[number])
                continue
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

    def _attend_from_single_tokens(
        self, singles: SingleTokens, layer: int, q: torch.Tensor, kept: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Store and attend for the chunks of one token: [1, M, N, D], of which their rows are filled."""
        assert self.cache.token_attention is not None
        keys, values = self.cache.layers[layer]
        new_keys, new_values = kept
        attended = q.new_empty(q.shape)
        self.cache.token_attention(
            q[0],
            (new_keys[0], new_values[0]),
            (keys, values),
            singles,
            self.cache.windows[layer],
            attended[0],
        )
        return attended

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
        self.attended, self._is_tiled, self._singles = (), False, None
        self.positions = positions.unsqueeze(0)
        self._rows = starts + positions
        self.lengths = TextLengths(
            torch.arange(len(positions) + 1, dtype=torch.int32, device=cache.device),
            torch.cat([starts, starts[-1:]]).to(torch.int32),
            (positions + 1).to(torch.int32),
            1,
            most_keys,
        )


def single_tokens_of(chunks: Sequence[SequenceChunk]) -> SingleTokens | None:
    """Return where the chunks of one token lie, on the host; `None` if there are none."""
    rows = accumulate((chunk.count for chunk in chunks), initial=0)
    found = [
        (row, chunk.slot.start, chunk.end)
        for row, chunk in zip(rows, chunks, strict=False)
        if chunk.count == 1
    ]
    return SingleTokens(*torch.tensor(found).T.contiguous()) if found else None


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
