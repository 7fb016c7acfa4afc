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

from ascendspeed_core.models.cache import CachedPass, KeyValueCache, Piece, Room
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits


@dataclass(frozen=True)
class Work:
    """A piece to run.

    Attributes:
        piece: where its keys and values go.
        ids: its tokens.
        read: how many of its last places have logits that are wanted.
    """

    piece: Piece
    ids: Sequence[int]
    read: int = 0


class ModelRunner:
    """A model, and a cache for the texts that it reads.

    Args:
        model: this process's part.
        mesh: its place.
        capacity_tokens: of all texts together.
    """

    def __init__(self, model: Transformer, mesh: ParallelMesh, capacity_tokens: int) -> None:
        self.model, self.mesh = model, mesh
        self.cache = make_cache(model, mesh, capacity_tokens)

    @torch.no_grad()
    def run(self, works: Sequence[Work]) -> list[torch.Tensor]:
        """Run pieces in one pass; return the logits that each wants, [P, V]."""
        device = self.mesh.device.torch
        cached = CachedPass(self.cache, [work.piece for work in works])
        tokens = torch.tensor([[token for work in works for token in work.ids]], device=device)
        places: list[int] = []
        end = 0
        for work in works:
            end += len(work.ids)
            places += range(end - work.read, end)
        # With nothing to read the head still runs once, for the stages that wait for its logits.
        read_at = None
        if len(places) < tokens.shape[1]:
            read_at = torch.tensor([places or [0]], device=device)
        local = forward_through_stages(self.model, self.mesh, tokens, cached, read_at)
        logits = gather_logits(local[0], self.model.config.vocab_size, self.mesh.group("tp"))
        return list(logits[: len(places)].split([work.read for work in works]))


def prefill(runner: ModelRunner, room: Room, ids: Sequence[int], start: int = 0) -> torch.Tensor:
    """Read `ids` from place `start` of a text on, and return the logits of the token that follows, [V]."""
    (logits,) = runner.run([Work(Piece(room, start, len(ids)), ids, 1)])
    return logits[0]


def decode_one_token(runner: ModelRunner, room: Room, token: int, place: int) -> torch.Tensor:
    """Read one more token of a text and return the logits of the one that follows, [V]."""
    return decode_tokens(runner, [room], [token], [place])[0]


def decode_tokens(
    runner: ModelRunner, rooms: Sequence[Room], tokens: Sequence[int], places: Sequence[int]
) -> torch.Tensor:
    """Read one more token of each text and return the logits of those that follow, [texts, V]."""
    works = [
        Work(Piece(room, place, 1), [token], 1)
        for room, token, place in zip(rooms, tokens, places, strict=True)
    ]
    return torch.cat(runner.run(works))


def make_cache(model: Transformer, mesh: ParallelMesh, capacity_tokens: int) -> KeyValueCache:
    """Return an empty cache for this process's layers and heads."""
    return KeyValueCache(
        num_layers=len(model.layers),
        num_key_value_heads=heads_of_cache(model, mesh),
        capacity_tokens=capacity_tokens,
        head_dim=model.config.head_dim,
        dtype=next(model.parameters()).dtype,
        device=mesh.device.torch,
    )


def bytes_per_token(model: Transformer, mesh: ParallelMesh) -> int:
    """Return what one token of a text takes in the cache of this process."""
    size = next(model.parameters()).dtype.itemsize
    return 2 * len(model.layers) * heads_of_cache(model, mesh) * model.config.head_dim * size


def heads_of_cache(model: Transformer, mesh: ParallelMesh) -> int:
    """Return the key-value heads of this process; with more devices than heads each has one."""
    return max(model.config.num_key_value_heads // mesh.layout.tp, 1)
