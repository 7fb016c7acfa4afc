"""Batch-invariant mode: results that are the same bit for bit whatever else is computed with them.

A matrix product adds up in an order that depends on its shape. So the same text gets other last bits when other texts
are computed with it, and another token where two are nearly equal. In this mode every pass has one of two fixed
shapes, filled up with padding, and attention reads each prompt in tiles of a fixed size, filled up too. Experts
multiply a fixed number of rows at once. Whether all rows of one product are added up alike is not assumed: it is
tried on the model itself.

What it costs: a pass that decodes one text computes 16 rows, and prompts are read 128 tokens at a time with logits at
each of them. `benchmarks/infer.py` measures it.

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
PREFILL_TOKENS = 128
DECODE_TOKENS = 16
EXPERT_ROWS = 16
"""Rows that an expert multiplies at once: how many tokens choose it depends on the others in a pass."""


@dataclass(frozen=True)
class PassShapes:
    """The fixed shapes of batch-invariant passes.

    Attributes:
        prefill_tokens: M while prompts are read.
        decode_tokens: M while texts are continued.
        chunk_tokens: attention reads a prompt in tiles that end at multiples of this; no chunk crosses one.
    """

    prefill_tokens: int = PREFILL_TOKENS
    decode_tokens: int = DECODE_TOKENS
    chunk_tokens: int = CHUNK_TOKENS

    def chunk_ends(self, start: int, end: int) -> Iterator[int]:
        """Yield the ends of the chunks in which the tokens of a prompt from `start` to `end` are read."""
        yield from range((start // self.chunk_tokens + 1) * self.chunk_tokens, end, self.chunk_tokens)
        yield end

    def slot_tokens(self, prompt_tokens: int, new_tokens: int, batch_invariant: bool) -> int:
        """Return how many tokens the slot of a text must have: the last tile of its prompt is computed whole."""
        tiles = -(-prompt_tokens // self.chunk_tokens) * self.chunk_tokens
        return max(prompt_tokens + new_tokens, tiles if batch_invariant else 0)

    def num_tokens(self, is_decode: bool) -> int:
        """Return M."""
        return self.decode_tokens if is_decode else self.prefill_tokens


def pack(chunks: Iterable[T], num_tokens: Callable[[T], int], pass_tokens: int) -> Iterator[list[T]]:
    """Put chunks, in order, into passes of at most `pass_tokens` tokens."""
    batch: list[T] = []
    left = pass_tokens
    for chunk in chunks:
        if num_tokens(chunk) > left:
            yield batch
            batch, left = [], pass_tokens
        batch.append(chunk)
        left -= num_tokens(chunk)
    if batch:
        yield batch


def pass_shapes_for(model: Transformer, mesh: ParallelMesh) -> PassShapes:
    """Return the fixed shapes of passes for a model under a layout.

    gloo adds small tensors up in the order of ranks; in large ones the order depends on the position.
    """
    most = SMALL_ELEMENTS // model.config.hidden_size // CHUNK_TOKENS * CHUNK_TOKENS
    if mesh.layout.tp <= 2 or most >= PREFILL_TOKENS:
        return PassShapes()
    return PassShapes(prefill_tokens=max(most, CHUNK_TOKENS))


def check_order_of_sums(mesh: ParallelMesh) -> None:
    """Raise `ConfigError` when ranks add up in an order that depends on where in a pass a text stands."""
    group = mesh.group("tp")
    if group is not None and mesh.layout.tp > 2 and dist.get_backend(group) != dist.Backend.GLOO:
        raise ConfigError(
            f"batch_invariant: with tensor_model_parallel_size={mesh.layout.tp} the order in which "
            f"{dist.get_backend(group)} adds up depends on the position in the batch; use at most 2 devices, or "
            "pipeline stages"
        )


def rows_are_alike(logits: torch.Tensor) -> bool:
    """Return whether all rows of [M, V] are the same bit for bit."""
    return torch.equal(logits, logits[:1].expand_as(logits))
