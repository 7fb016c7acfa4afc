"""Batch-invariant mode: results that are the same bit for bit whatever else is computed with them.

A matrix product adds up in an order that depends on its shape, so the same text gives other last bits in other company,
and another token where two are nearly equal. In this mode every pass has one of two fixed shapes, filled up with
padding, and attention cuts each text at places that depend on that text alone. What is left to chance is whether all
rows of one product are added up alike; that is tried on the model itself, not assumed.

What it costs: a pass that decodes one text computes 16 rows, prompts are read 128 tokens at a time with logits at each
of them, and of a shared beginning only whole chunks are reused. `benchmarks/infer.py` measures it.

Shapes: M tokens of a pass, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.collectives import SMALL_ELEMENTS
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import ConfigError

T = TypeVar("T")

CHUNK_TOKENS = 32
PROMPT_TILE_TOKENS = 128
DECODING_TILE_TOKENS = 16


@dataclass(frozen=True)
class Tiles:
    """Fixed shapes of passes.

    Attributes:
        prompt_tokens: M while prompts are read.
        decoding_tokens: M while texts are continued.
        chunk_tokens: attention reads a prompt in pieces that end at multiples of this.
    """

    prompt_tokens: int = PROMPT_TILE_TOKENS
    decoding_tokens: int = DECODING_TILE_TOKENS
    chunk_tokens: int = CHUNK_TOKENS

    def cut(self, start: int, end: int) -> Iterator[int]:
        """Give the ends of the pieces in which the tokens of a prompt from `start` to `end` are read."""
        yield from range((start // self.chunk_tokens + 1) * self.chunk_tokens, end, self.chunk_tokens)
        yield end

    def reusable(self, common_tokens: int) -> int:
        """Return how many tokens of a common beginning were computed in the same pieces."""
        return common_tokens // self.chunk_tokens * self.chunk_tokens

    def size(self, is_decoding: bool) -> int:
        """Return M."""
        return self.decoding_tokens if is_decoding else self.prompt_tokens


def pack(pieces: Iterable[T], tokens: Callable[[T], int], size: int) -> Iterator[list[T]]:
    """Put pieces, in order, into tiles of `size` tokens."""
    tile: list[T] = []
    left = size
    for piece in pieces:
        if tokens(piece) > left:
            yield tile
            tile, left = [], size
        tile.append(piece)
        left -= tokens(piece)
    if tile:
        yield tile


def tiles_for(model: Transformer, mesh: ParallelMesh) -> Tiles:
    """Return the tiles of a model.

    Small sums over gloo are added up in the order of processes; in large ones the order depends on the place.
    """
    most = SMALL_ELEMENTS // model.config.hidden_size // CHUNK_TOKENS * CHUNK_TOKENS
    if mesh.layout.tp <= 2 or most >= PROMPT_TILE_TOKENS:
        return Tiles()
    return Tiles(prompt_tokens=max(most, CHUNK_TOKENS))


def check_order_of_sums(mesh: ParallelMesh) -> None:
    """Raise `ConfigError` when devices add up in an order that depends on where in a tile a text stands."""
    group = mesh.group("tp")
    if group is not None and mesh.layout.tp > 2 and dist.get_backend(group) != dist.Backend.GLOO:
        raise ConfigError(
            f"batch_invariant: with tensor_model_parallel_size={mesh.layout.tp} the order in which "
            f"{dist.get_backend(group)} adds up depends on the place in the batch; use at most 2 devices, or pipeline "
            "stages"
        )


def rows_are_alike(logits: torch.Tensor) -> bool:
    """Tell whether all rows of [M, V] are the same bit for bit."""
    return torch.equal(logits, logits[:1].expand_as(logits))
