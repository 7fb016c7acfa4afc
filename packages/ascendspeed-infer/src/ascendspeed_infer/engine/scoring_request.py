"""Score texts on the engine: all of them in one cache slot, one after another, as a request among others.

Sequences are scored in the order of their ids, so that each runs only what it does not have in common with the one
before: the examples that many prompts share, and a context with several continuations, are computed once. Passes are
those of the batch-invariant mode: a score is the same bit for bit whatever is computed beside it, in which order, and
where its context ends.

Shapes: P positions, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ascendspeed_core.models.cache import CacheSlot, SequenceChunk
from ascendspeed_infer.engine.batch_invariant import PassShapes, pack
from ascendspeed_infer.engine.model_runner import ScheduledChunk
from ascendspeed_infer.engine.prefix_cache import common_prefix_length


@dataclass(frozen=True)
class ScoringInput:
    """A context and its continuation, tokenized and cut to what the model takes.

    Attributes:
        token_ids: of context and continuation.
        num_continuation: how many of them are the continuation's.
        truncated_tokens: how many ids of the context were left out.
    """

    token_ids: tuple[int, ...]
    num_continuation: int
    truncated_tokens: int

    @property
    def first_position(self) -> int:
        """The first position whose logits are wanted."""
        return len(self.token_ids) - self.num_continuation - 1


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its context.

    Attributes:
        logprob: natural logarithm of its probability, the sum over its tokens.
        is_greedy: greedy decoding would have produced it.
        truncated_tokens: tokens of the context that did not fit and were left out.
    """

    logprob: float
    is_greedy: bool
    truncated_tokens: int


@dataclass(frozen=True)
class _ScoredSequence:
    """What the model reads of an input, all but the last id, and the first position whose logits are wanted."""

    token_ids: tuple[int, ...]
    first_position: int


_Piece = tuple[_ScoredSequence, ScheduledChunk]


class ScoringRequest:
    """Log-likelihoods of continuations after their contexts.

    Args:
        inputs: what is scored, each with at least one id of context and of continuation.
        shapes: fixed shapes of the passes.

    Attributes:
        scores: of each input, filled in as passes are run.
        error: what ended the request early; set by the engine.
    """

    def __init__(self, inputs: Sequence[ScoringInput], shapes: PassShapes) -> None:
        self._shapes = shapes
        self._inputs: dict[_ScoredSequence, list[ScoringInput]] = {}
        for one in sorted(set(inputs), key=lambda one: one.token_ids):
            self._inputs.setdefault(_ScoredSequence(one.token_ids[:-1], one.first_position), []).append(one)
        longest = max((len(sequence.token_ids) for sequence in self._inputs), default=0)
        self.max_tokens = shapes.slot_tokens(longest, 0, batch_invariant=True)
        """Of the longest sequence: as many must fit into the cache slot."""
        self.scores: dict[ScoringInput, Score] = {}
        self.error: Exception | None = None
        self._slot: CacheSlot | None = None
        self._batches: Iterator[list[_Piece]] = iter(())
        self._batch: list[_Piece] = []
        self._logits: list[torch.Tensor] = []
        self._num_inputs = len(set(inputs))
        self._not_finite: list[_ScoredSequence] = []
        self._shares_prefixes = True

    @property
    def is_finished(self) -> bool:
        """Whether every input has its score, or an error ended the request."""
        return len(self.scores) == self._num_inputs or self.error is not None

    def start(self, slot: CacheSlot) -> None:
        """Begin in a cache slot of at least `max_tokens`."""
        self._slot = slot
        self._batches = self._packed(self._inputs)

    def _packed(self, sequences: Iterable[_ScoredSequence]) -> Iterator[list[_Piece]]:
        assert self._slot is not None
        pieces = _pieces(self._slot, sequences, self._shapes, self._shares_prefixes)
        return pack(pieces, lambda piece: len(piece[1].token_ids), self._shapes.prefill_tokens)

    def next_chunks(self) -> list[ScheduledChunk]:
        """Return what the next pass runs."""
        batch = next(self._batches, None)
        if batch is None:
            # A number that is none spoils all positions of its tile, and with them who shares the first of them.
            self._shares_prefixes = False
            self._batches = self._packed(self._not_finite)
            batch = next(self._batches)
        self._batch = batch
        return [chunk for _, chunk in self._batch]

    def advance(self, logits: Sequence[torch.Tensor]) -> None:
        """Take the logits of each chunk, [P, V], and score the sequences that are complete."""
        for (sequence, chunk), part in zip(self._batch, logits, strict=True):
            if chunk.num_logits:
                self._logits.append(part)
            if chunk.chunk.end == len(sequence.token_ids):
                whole, self._logits = torch.cat(self._logits), []
                if self._shares_prefixes and not whole.isfinite().all():
                    self._not_finite.append(sequence)
                else:
                    self.take_logits(whole, self._inputs[sequence])

    def take_logits(self, logits: torch.Tensor, inputs: Sequence[ScoringInput]) -> None:
        """Score the continuations of one sequence from the logits of its last positions, [P, V]."""
        self.scores |= _scores(logits, inputs)


def _pieces(
    slot: CacheSlot, sequences: Iterable[_ScoredSequence], shapes: PassShapes, shares_prefixes: bool
) -> Iterator[_Piece]:
    """Cut sequences into chunks that are run in order, each sequence in place of the one before."""
    before: tuple[int, ...] = ()
    for sequence in sequences:
        # Of what both have in common keys and values are those that this sequence would get by itself.
        start = min(common_prefix_length(before, sequence.token_ids), sequence.first_position)
        for end in shapes.chunk_ends(start, len(sequence.token_ids)):
            num_logits = max(end - max(start, sequence.first_position), 0)
            chunk = SequenceChunk(slot, start, end - start)
            yield (
                sequence,
                ScheduledChunk(chunk, sequence.token_ids[start:end], num_logits, batch_invariant=True),
            )
            start = end
        before = sequence.token_ids if shares_prefixes else ()


def log_probs_of(logits: torch.Tensor) -> torch.Tensor:
    """Return log-probabilities in fp32 or wider, [P, V] -> [P, V]."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)


def _scores(logits: torch.Tensor, inputs: Sequence[ScoringInput]) -> dict[ScoringInput, Score]:
    """Add up the log-probabilities of continuations of one sequence; logits of its last positions, [P, V]."""
    log_probs = log_probs_of(logits)
    scores = {}
    for one in inputs:
        own = log_probs[len(log_probs) - one.num_continuation :]
        targets = torch.tensor(
            one.token_ids[len(one.token_ids) - one.num_continuation :], device=logits.device
        )
        # In double precision, as a client adds up the log-probabilities that a server sends.
        chosen = sum(own.gather(-1, targets.unsqueeze(-1)).squeeze(-1).tolist())
        is_greedy = bool((own.argmax(dim=-1) == targets).all())
        scores[one] = Score(chosen, is_greedy, one.truncated_tokens)
    return scores
