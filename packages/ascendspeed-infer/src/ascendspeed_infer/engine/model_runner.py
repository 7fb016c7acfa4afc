"""Run chunks of sequences through the model, with the cached keys and values of what came before.

`prefill` and `decode_tokens` are all that decoding needs:

    runner = ModelRunner(model, mesh, cache_tokens=64)
    slot = runner.cache.reserve(64)
    logits = prefill(runner, slot, ids)
    logits = decode_one_token(runner, slot, int(logits.argmax()), len(ids))

All ranks of a layout call alike and get the same logits, bit for bit. This file is the only one of the package that
calls the model.

Shapes: M tokens of a pass, P positions whose logits are wanted, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ascendspeed_core.kernels.lengths import lengths_attention
from ascendspeed_core.kernels.single_tokens import token_attention
from ascendspeed_core.models.attention import changed_scores
from ascendspeed_core.models.cache import CacheSlot, KeyValueCache, SequenceChunk
from ascendspeed_core.models.cached_pass import CachedPass
from ascendspeed_core.models.experts import tiled_experts
from ascendspeed_core.models.lora import AdapterRows
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer.engine.batch_invariant import (
    EXPERT_ROWS,
    check_order_of_sums,
    pack,
    pass_shapes_for,
    rows_are_alike,
)
from ascendspeed_infer.engine.decode_graph import SIZES, decode_graphs_for


@dataclass(frozen=True)
class ScheduledChunk:
    """Tokens of one sequence that a pass runs.

    Attributes:
        chunk: where their keys and values go.
        token_ids: the tokens.
        num_logits: how many of the last positions have logits that are wanted.
        is_decode: whether it continues a text, one token at a time; otherwise it is part of a prompt.
        batch_invariant: run it in a pass of fixed shape.
        adapter: number of the adapter, where the model has several; `None` for the model alone.
    """

    chunk: SequenceChunk
    token_ids: Sequence[int]
    num_logits: int = 0
    is_decode: bool = False
    batch_invariant: bool = False
    adapter: int | None = None


class ModelRunner:
    """A model, and the key-value cache of the sequences that it reads.

    Args:
        model: this rank's part.
        mesh: the layout and this rank's position in it.
        cache_tokens: capacity of the cache, for all sequences together.
    """

    def __init__(self, model: Transformer, mesh: ParallelMesh, cache_tokens: int = 0) -> None:
        self.model, self.mesh = model, mesh
        self.shapes = pass_shapes_for(model, mesh)
        is_stacked = model.adapters is not None and bool(model.adapters.names)
        self._adapter_rows = AdapterRows(model) if is_stacked else None
        self.cache = make_cache(model, mesh, cache_tokens)

    @property
    def cache(self) -> KeyValueCache:
        """Keys and values of the sequences; with another one what was recorded of passes is lost."""
        return self._cache

    @cache.setter
    def cache(self, cache: KeyValueCache) -> None:
        self._cache = cache
        # Which adapter a text has is not in a record.
        is_plain = self._adapter_rows is None
        self._graphs = decode_graphs_for(self.model, self.mesh, cache) if is_plain else None

    @torch.no_grad()
    def run(self, chunks: Sequence[ScheduledChunk]) -> list[torch.Tensor]:
        """Run chunks, in one pass and in further ones of fixed shape; return the logits that each wants, [P, V]."""
        plain = [number for number, one in enumerate(chunks) if not one.batch_invariant]
        if len(plain) == len(chunks):
            return self._run_pass(chunks)
        found: dict[int, torch.Tensor] = {}
        if plain:
            found |= zip(plain, self._run_pass([chunks[number] for number in plain]), strict=True)
        for is_decode in (True, False):
            size = self.shapes.num_tokens(is_decode)
            fixed = [
                number
                for number, one in enumerate(chunks)
                if one.batch_invariant and one.is_decode == is_decode
            ]
            for batch in pack(fixed, lambda number: len(chunks[number].token_ids), size):
                logits = self._run_fixed_pass([chunks[number] for number in batch], is_decode)
                found |= zip(batch, logits, strict=True)
        return [found[number] for number in range(len(chunks))]

    @torch.no_grad()
    def forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Return the logits at every position of one text without the cache, [S, V]."""
        tokens = torch.tensor([list(token_ids)], device=self.mesh.device.torch)
        if self._adapter_rows is not None:
            self._adapter_rows.choose([None] * len(token_ids))
        logits = forward_through_stages(self.model, self.mesh, ModelInput(tokens))
        return gather_logits(logits[0], self.model.config.vocab_size, self.mesh.group("tp"))

    def _run_fixed_pass(self, chunks: Sequence[ScheduledChunk], is_decode: bool) -> list[torch.Tensor]:
        """Run chunks in one pass of fixed shape, the rest of it padding, with logits everywhere."""
        size = self.shapes.num_tokens(is_decode)
        ids = [token for one in chunks for token in one.token_ids]
        tile_tokens = None if is_decode else self.shapes.chunk_tokens
        cached = CachedPass(self.cache, [one.chunk for one in chunks], size, tile_tokens)
        with tiled_experts(self.model, EXPERT_ROWS):
            logits = self._forward([*ids, *[0] * (size - len(ids))], cached, None, chunks)
        counts = [len(one.token_ids) for one in chunks]
        *parts, _ = logits.split([*counts, size - len(ids)])
        return [part[len(part) - one.num_logits :] for part, one in zip(parts, chunks, strict=True)]

    def _run_pass(self, chunks: Sequence[ScheduledChunk]) -> list[torch.Tensor]:
        """Run chunks in one pass, with logits where they are wanted."""
        if self._graphs is not None and is_recordable(chunks):
            ids = [one.token_ids[0] for one in chunks]
            return list(self._graphs.run(ids, [one.chunk for one in chunks]).split(1))
        tokens = [token for one in chunks for token in one.token_ids]
        cached = CachedPass(self.cache, [one.chunk for one in chunks])
        positions: list[int] = []
        end = 0
        for one in chunks:
            end += len(one.token_ids)
            positions += range(end - one.num_logits, end)
        # When no logits are wanted the head still runs once, for the stages that wait for its logits.
        read_at = None
        if len(positions) < len(tokens):
            read_at = torch.tensor([positions or [0]], device=self.mesh.device.torch)
        logits = self._forward(tokens, cached, read_at, chunks)
        return list(logits[: len(positions)].split([one.num_logits for one in chunks]))

    def _forward(
        self,
        tokens: Sequence[int],
        cached: CachedPass,
        read_at: torch.Tensor | None,
        chunks: Sequence[ScheduledChunk],
    ) -> torch.Tensor:
        if self._adapter_rows is not None:
            rows = [one.adapter for one in chunks for _ in one.token_ids]
            self._adapter_rows.choose([*rows, *[None] * (len(tokens) - len(rows))])
        ids = torch.tensor([tokens], device=self.mesh.device.torch)
        local = forward_through_stages(self.model, self.mesh, ModelInput(ids, cache=cached, read_at=read_at))
        return gather_logits(local[0], self.model.config.vocab_size, self.mesh.group("tp"))


def check_batch_invariance(model: Transformer, mesh: ParallelMesh) -> None:
    """Try whether the rows of each fixed shape are added up alike on this machine; all ranks call together.

    Raises:
        AscendSpeedError: they are not.
        ConfigError: a layout whose sums depend on the position in the batch.
    """
    check_order_of_sums(mesh)
    runner = ModelRunner(model, mesh)
    tile_tokens = runner.shapes.chunk_tokens
    runner.cache = make_cache(model, mesh, tile_tokens)
    slot = runner.cache.reserve(tile_tokens)
    for is_decode in (True, False):
        size = runner.shapes.num_tokens(is_decode)
        # One text of a single token, once in every row.
        chunks = [ScheduledChunk(SequenceChunk(slot, 0, 1), [0], 1, is_decode, True)] * size
        if not rows_are_alike(torch.cat(runner.run(chunks))):
            raise AscendSpeedError(
                f"batch_invariant: a product of {size} rows adds up in an order that depends on the row, on this "
                "device with this version of torch; try another number of threads (OMP_NUM_THREADS), or go without"
            )


def prefill(runner: ModelRunner, slot: CacheSlot, ids: Sequence[int], start: int = 0) -> torch.Tensor:
    """Read `ids` from position `start` of a text on, and return the logits of the token that follows, [V]."""
    (logits,) = runner.run([ScheduledChunk(SequenceChunk(slot, start, len(ids)), ids, 1)])
    return logits[0]


def decode_one_token(runner: ModelRunner, slot: CacheSlot, token: int, position: int) -> torch.Tensor:
    """Read one more token of a text and return the logits of the one that follows, [V]."""
    return decode_tokens(runner, [slot], [token], [position])[0]


def decode_tokens(
    runner: ModelRunner, slots: Sequence[CacheSlot], tokens: Sequence[int], positions: Sequence[int]
) -> torch.Tensor:
    """Read one more token of each text and return the logits of those that follow, [texts, V]."""
    chunks = [
        ScheduledChunk(SequenceChunk(slot, position, 1), [token], 1, is_decode=True)
        for slot, token, position in zip(slots, tokens, positions, strict=True)
    ]
    return torch.cat(runner.run(chunks))


def make_cache(model: Transformer, mesh: ParallelMesh, cache_tokens: int) -> KeyValueCache:
    """Return an empty cache for what this rank's layers keep."""
    dtype, config = next(model.parameters()).dtype, model.config
    # One latent for keys and values is not what that call reads.
    is_latent = config.kv_latent_dim is not None
    changes_scores = is_latent or config.position == "alibi" or changed_scores(config) is not None
    given = (mesh.device, dtype, config.head_dim, changes_scores, config.attention_scale)
    return KeyValueCache(
        model.layer_caches(mesh.layout.tp),
        cache_tokens,
        dtype,
        mesh.device.torch,
        lengths_attention(*given),
        token_attention(*given),
    )


def is_recordable(chunks: Sequence[ScheduledChunk]) -> bool:
    """Return whether a pass gives one more token to each of several texts, and does nothing else."""
    slots = {one.chunk.slot.start for one in chunks}
    is_plain = all(one.is_decode and one.num_logits == len(one.token_ids) == 1 for one in chunks)
    return is_plain and len(slots) == len(chunks) <= SIZES[-1]
