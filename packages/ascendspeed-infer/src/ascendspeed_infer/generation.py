"""Continue texts: one, several side by side, or beams of one; each call with an engine of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ascendspeed_core.models.cache import BLOCK_TOKENS, blocks_of
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_infer.beams import BeamSettings
from ascendspeed_infer.engine.batch_invariant import Tiles
from ascendspeed_infer.engine.runner import ModelRunner
from ascendspeed_infer.engine.scheduler import Engine, check_length
from ascendspeed_infer.engine.sequences import (
    BeamSearch,
    Continuation,
    Ends,
    FinishReason,
    Generated,
    GenerationSettings,
    Text,
    never,
)

GROWTH = 2
"""A chat's memory is made for texts so many times as long as the one that needs it, as texts get longer."""

__all__ = [
    "ChatMemory",
    "Ends",
    "FinishReason",
    "Generated",
    "GenerationSettings",
    "Step",
    "check_length",
    "complete_in_order",
    "engine_for",
    "generate_ids",
    "generate_together",
    "never",
    "search_beams",
    "stream_ids",
]


@dataclass(frozen=True)
class Step:
    """One more token of a text.

    Attributes:
        token_id: the token.
        log_prob: of it, where asked for.
        finish_reason: why the text ends with it; `None` when it goes on.
    """

    token_id: int
    log_prob: float | None
    finish_reason: FinishReason | None


def engine_for(
    model: Transformer,
    mesh: ParallelMesh,
    requests: Sequence[Continuation],
    max_rows: int,
    tiles: Tiles | None = None,
) -> Engine:
    """Return an engine with memory for the `max_rows` longest texts of some requests at once.

    With the tiles of `check_batch_invariance` it is batch-invariant.
    """
    limit = model.config.max_position_embeddings
    for one in requests:
        check_length(len(one.prompt_ids), one.max_new_tokens, limit)
    blocks = [
        blocks_of(len(one.prompt_ids) + one.max_new_tokens) for one in requests for _ in range(one.max_rows)
    ]
    capacity = sum(sorted(blocks)[-max_rows:]) * BLOCK_TOKENS
    return Engine(ModelRunner(model, mesh, capacity, tiles), max_rows)


def stream_ids(
    model: Transformer,
    mesh: ParallelMesh,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    ends: Ends = never,
    memory: "ChatMemory | None" = None,
    tiles: Tiles | None = None,
) -> Iterator[Step]:
    """Continue one prompt, token by token; all processes of a layout iterate alike and get the same tokens.

    Args:
        model: this process's part.
        mesh: its place.
        prompt_ids: at least one id.
        settings: length, sampling, end ids.
        ends: whether a stop text is there.
        memory: of texts before, whose beginning need not be read again.
        tiles: of `check_batch_invariance`, for a text that is the same bit for bit whatever the company.

    Raises:
        AscendSpeedError: an empty prompt, or one that leaves no room for the new tokens.
    """
    text = Text(prompt_ids, settings, ends)
    engine = engine_for(model, mesh, [text], 1, tiles) if memory is None else memory.engine_for(text, tiles)
    engine.submit(text)
    try:
        while engine.is_busy:
            if engine.step():
                log_prob = text.log_probs[-1] if text.log_probs else None
                yield Step(text.new_ids[-1], log_prob, text.finish_reason)
    finally:
        # Whoever reads may stop before the end.
        engine.cancel(text)


class ChatMemory:
    """Keys and values of the latest text, for the next one that begins like it: a chat does not read its history again.

    Args:
        model: this process's part.
        mesh: its place.
    """

    def __init__(self, model: Transformer, mesh: ParallelMesh) -> None:
        self._model, self._mesh = model, mesh
        self._engine: Engine | None = None
        self._tiles: Tiles | None = None

    def engine_for(self, text: Text, tiles: Tiles | None) -> Engine:
        """Return an engine that has room for a text beside the one before."""
        limit = self._model.config.max_position_embeddings
        check_length(len(text.prompt_ids), text.max_new_tokens, limit)
        needed = blocks_of(len(text.prompt_ids) + text.max_new_tokens)
        if self._engine is None or self._engine.num_blocks < 2 * needed or tiles != self._tiles:
            # Memory of the smaller one is free before the larger one takes its own.
            self._engine = None
            blocks = 2 * min(GROWTH * needed, blocks_of(limit))
            runner = ModelRunner(self._model, self._mesh, blocks * BLOCK_TOKENS, tiles)
            self._engine, self._tiles = Engine(runner, max_rows=1), tiles
        return self._engine

    @property
    def reused_tokens(self) -> int:
        """Of prompts, so many were not read again by the engine of today."""
        return 0 if self._engine is None else self._engine.reused_tokens


def complete_in_order(
    model: Transformer,
    mesh: ParallelMesh,
    requests: Sequence[Text | BeamSearch],
    max_rows: int,
    tiles: Tiles | None = None,
) -> Iterator[Text | BeamSearch]:
    """Continue requests side by side and give each once it is complete, in their order; see `stream_ids`.

    Args:
        model: this process's part.
        mesh: its place.
        requests: what is continued; others are computed while one is waited for.
        max_rows: texts computed in one pass at most; a beam search counts with its beams.
        tiles: see `stream_ids`.
    """
    engine = engine_for(model, mesh, requests, max_rows, tiles)
    for request in requests:
        engine.submit(request)
    for request in requests:
        while not request.is_complete:
            engine.step()
        yield request


def generate_ids(
    model: Transformer,
    mesh: ParallelMesh,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    ends: Ends = never,
) -> Generated:
    """Continue one prompt to its end; see `stream_ids`."""
    return generate_together(model, mesh, [prompt_ids], [settings], [ends])[0]


def generate_together(
    model: Transformer,
    mesh: ParallelMesh,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[GenerationSettings],
    ends: Sequence[Ends],
    batch_size: int | None = None,
    tiles: Tiles | None = None,
) -> list[Generated]:
    """Continue several prompts, of any lengths, at most `batch_size` of them in a pass; see `stream_ids`."""
    texts = [Text(*one) for one in zip(prompts, settings, ends, strict=True)]
    engine = engine_for(model, mesh, texts, batch_size or len(texts), tiles)
    for text in texts:
        engine.submit(text)
    engine.run()
    return [text.generated() for text in texts]


def search_beams(
    model: Transformer,
    mesh: ParallelMesh,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    beam_settings: BeamSettings,
    ends: Ends = never,
    tiles: Tiles | None = None,
) -> list[Generated]:
    """Continue one prompt by beam search; see `stream_ids`.

    Returns:
        `num_return_sequences` texts, the best first; fewer if the rules leave no more.
    """
    search = BeamSearch(prompt_ids, settings, beam_settings, ends)
    next(complete_in_order(model, mesh, [search], search.max_rows, tiles))
    return search.generated()
