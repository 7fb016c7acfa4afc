"""Run pieces of texts through the model, with the keys and values of what came before.

`prefill` and `decode_tokens` are all that decoding one text needs:

    runner = ModelRunner(model, mesh, capacity_tokens=64)
    room = runner.cache.reserve(64)
    logits = prefill(runner, room, ids)
    logits = decode_one_token(runner, room, int(logits.argmax()), len(ids))

All processes of a layout call alike and get the same logits, bit for bit.

Shapes: M tokens of a pass, P places whose logits are wanted, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ascendspeed_core.models.cache import CachedPass, CacheSlot, KeyValueCache, SequenceChunk
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.engine.batch_invariant import (
    Tiles,
    check_order_of_sums,
    pack,
    rows_are_alike,
    tiles_for,
)


@dataclass(frozen=True)
class Work:
    """A piece to run.

    Attributes:
        piece: where its keys and values go.
        ids: its tokens.
        read: how many of its last places have logits that are wanted.
        is_decoding: whether it continues a text, one token at a time; otherwise it is a prompt's.
    """

    piece: SequenceChunk
    ids: Sequence[int]
    read: int = 0
    is_decoding: bool = False


class ModelRunner:
    """A model, and a cache for the texts that it reads.

    Args:
        model: this process's part.
        mesh: its place.
        capacity_tokens: of all texts together.
        tiles: of the batch-invariant mode, if that is wanted.
    """

    def __init__(
        self, model: Transformer, mesh: ParallelMesh, capacity_tokens: int, tiles: Tiles | None = None
    ) -> None:
        self.model, self.mesh, self.tiles = model, mesh, tiles
        self.cache = make_cache(model, mesh, capacity_tokens)

    @torch.no_grad()
    def run(self, works: Sequence[Work]) -> list[torch.Tensor]:
        """Run pieces, in one pass or tile by tile; return the logits that each wants, [P, V]."""
        if self.tiles is None:
            return self._run_pass(works)
        found: dict[int, torch.Tensor] = {}
        for is_decoding in (True, False):
            size = self.tiles.size(is_decoding)
            mine = [number for number, work in enumerate(works) if work.is_decoding == is_decoding]
            for tile in pack(mine, lambda number: len(works[number].ids), size):
                found |= dict(zip(tile, self._run_tile([works[one] for one in tile], size), strict=True))
        return [found[number] for number in range(len(works))]

    def _run_tile(self, works: Sequence[Work], size: int) -> list[torch.Tensor]:
        """Run pieces in one pass of `size` tokens, the rest of it padding, with logits everywhere."""
        ids = [token for work in works for token in work.ids]
        cached = CachedPass(self.cache, [work.piece for work in works], size)
        logits = self._forward([*ids, *[0] * (size - len(ids))], cached, None)
        counts = [len(work.ids) for work in works]
        *parts, _ = logits.split([*counts, size - len(ids)])
        return [part[len(part) - work.read :] for part, work in zip(parts, works, strict=True)]

    def _run_pass(self, works: Sequence[Work]) -> list[torch.Tensor]:
        """Run pieces in one pass, with logits where they are wanted."""
        tokens = [token for work in works for token in work.ids]
        cached = CachedPass(self.cache, [work.piece for work in works])
        places: list[int] = []
        end = 0
        for work in works:
            end += len(work.ids)
            places += range(end - work.read, end)
        # With nothing to read the head still runs once, for the stages that wait for its logits.
        read_at = None
        if len(places) < len(tokens):
            read_at = torch.tensor([places or [0]], device=self.mesh.device.torch)
        logits = self._forward(tokens, cached, read_at)
        return list(logits[: len(places)].split([work.read for work in works]))

    def _forward(
        self, tokens: Sequence[int], cached: CachedPass, read_at: torch.Tensor | None
    ) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.mesh.device.torch)
        local = forward_through_stages(self.model, self.mesh, ModelInput(ids, cache=cached, read_at=read_at))
        return gather_logits(local[0], self.model.config.vocab_size, self.mesh.group("tp"))


def check_batch_invariance(model: Transformer, mesh: ParallelMesh) -> Tiles:
    """Try whether the rows of each tile are added up alike on this machine; all processes call together.

    Returns:
        Tiles for `ModelRunner`.

    Raises:
        AscendSpeedError: they are not.
        ConfigError: a layout whose sums depend on the place.
    """
    check_order_of_sums(mesh)
    tiles = tiles_for(model, mesh)
    runner = ModelRunner(model, mesh, 1, tiles)
    room = runner.cache.reserve(1)
    for is_decoding in (True, False):
        size = tiles.size(is_decoding)
        # One text of a single token, once in every row.
        works = [Work(SequenceChunk(room, 0, 1), [0], 1, is_decoding)] * size
        if not rows_are_alike(torch.cat(runner.run(works))):
            raise AscendSpeedError(
                f"batch_invariant: a product of {size} rows adds up in an order that depends on the row, on this "
                "device with this version of torch; try another number of threads (OMP_NUM_THREADS), or go without"
            )
    return tiles


def prefill(runner: ModelRunner, room: CacheSlot, ids: Sequence[int], start: int = 0) -> torch.Tensor:
    """Read `ids` from place `start` of a text on, and return the logits of the token that follows, [V]."""
    (logits,) = runner.run([Work(SequenceChunk(room, start, len(ids)), ids, 1)])
    return logits[0]


def decode_one_token(runner: ModelRunner, room: CacheSlot, token: int, place: int) -> torch.Tensor:
    """Read one more token of a text and return the logits of the one that follows, [V]."""
    return decode_tokens(runner, [room], [token], [place])[0]


def decode_tokens(
    runner: ModelRunner, rooms: Sequence[CacheSlot], tokens: Sequence[int], places: Sequence[int]
) -> torch.Tensor:
    """Read one more token of each text and return the logits of those that follow, [texts, V]."""
    works = [
        Work(SequenceChunk(room, place, 1), [token], 1, is_decoding=True)
        for room, token, place in zip(rooms, tokens, places, strict=True)
    ]
    return torch.cat(runner.run(works))


def make_cache(model: Transformer, mesh: ParallelMesh, capacity_tokens: int) -> KeyValueCache:
    """Return an empty cache for what this rank's layers keep."""
    dtype = next(model.parameters()).dtype
    return KeyValueCache(model.layer_caches(mesh.layout.tp), capacity_tokens, dtype, mesh.device.torch)


def bytes_per_token(model: Transformer, mesh: ParallelMesh) -> int:
    """Return what one token of a text takes in the cache of this rank."""
    size = next(model.parameters()).dtype.itemsize
    return size * sum(layer.elements_per_token for layer in model.layer_caches(mesh.layout.tp))
