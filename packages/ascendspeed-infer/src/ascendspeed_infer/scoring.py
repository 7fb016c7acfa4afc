"""Log-likelihoods of continuations: what benchmark scores stand on.

Texts are scored in the order of their ids, all in one room of the cache, so that each runs only what it does not have
in common with the one before: the examples that many prompts share, and a context with several continuations, are
computed once. Passes are those of the batch-invariant mode: a score is the same bit for bit whatever is scored beside
it and in whatever order.

Shapes: P places, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from ascendspeed_core.models.cache import CacheSlot, SequenceChunk
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.engine.batch_invariant import Tiles, pack, tiles_for
from ascendspeed_infer.engine.runner import ModelRunner, Work
from ascendspeed_infer.engine.scheduler import common_prefix


@dataclass(frozen=True)
class Score:
    """How likely a continuation is after its context.

    Attributes:
        logprob: natural logarithm of its probability, added up over its tokens.
        is_greedy: greedy decoding would have produced it.
        truncated_tokens: tokens of the context that did not fit and were left out.
    """

    logprob: float
    is_greedy: bool
    truncated_tokens: int


@dataclass(frozen=True)
class Pair:
    """What is scored.

    Attributes:
        context: what stands before.
        continuation: what is scored.
    """

    context: str
    continuation: str


@dataclass(frozen=True)
class _Row:
    """A tokenized pair, cut to what the model can take.

    Attributes:
        ids: of context and continuation.
        num_continuation: ids of the continuation.
        truncated_tokens: ids of the context that were left out.
    """

    ids: tuple[int, ...]
    num_continuation: int
    truncated_tokens: int

    @property
    def first_place(self) -> int:
        """The first place whose logits are wanted."""
        return len(self.ids) - self.num_continuation - 1


@dataclass(frozen=True)
class _Text:
    """What the model reads of a pair, all but the last id, and the first place whose logits are wanted."""

    ids: tuple[int, ...]
    first_place: int

    def cuts(self, tiles: Tiles) -> list[int]:
        """Return where its pieces end: context and continuation are cut each by itself."""
        context = tiles.cut(0, self.first_place) if self.first_place else ()
        continuation = range(self.first_place + tiles.chunk_tokens, len(self.ids), tiles.chunk_tokens)
        return [*context, *continuation, len(self.ids)]


@torch.no_grad()
def loglikelihood(
    model: Transformer,
    mesh: ParallelMesh,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    max_tokens: int,
    tiles: Tiles | None = None,
) -> list[Score]:
    """Score continuations after their contexts.

    Args:
        model: this process's part.
        mesh: its place; all processes of a tensor-parallel group and all stages call alike.
        tokenizer: of the model.
        pairs: what is scored.
        max_tokens: longest input; longer ones lose the beginning of their context, which is counted.
        tiles: shapes of passes, if not the usual ones.

    Raises:
        AscendSpeedError: a continuation alone is longer than `max_tokens`, or has nothing before it.
    """
    rows = _rows(tokenizer, pairs, max_tokens)
    scores = _score_all(model, mesh, rows, tiles or tiles_for(model, mesh))
    return [scores[row] for row in rows]


@torch.no_grad()
def loglikelihood_of_ids(
    model: Transformer, mesh: ParallelMesh, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Score]:
    """Score ids after ids; see `loglikelihood`."""
    for before, after in pairs:
        if not before or not after:
            raise AscendSpeedError(
                f"a pair has {len(before)} ids of context and {len(after)} of continuation; give one or more of each"
            )
    rows = [_Row((*before, *after), len(after), 0) for before, after in pairs]
    scores = _score_all(model, mesh, rows, tiles_for(model, mesh))
    return [scores[row] for row in rows]


def _score_all(
    model: Transformer, mesh: ParallelMesh, rows: Sequence[_Row], tiles: Tiles
) -> dict[_Row, Score]:
    by_text: dict[_Text, list[_Row]] = {}
    for row in sorted(set(rows), key=lambda row: row.ids):
        by_text.setdefault(_Text(row.ids[:-1], row.first_place), []).append(row)
    longest = max((len(text.ids) for text in by_text), default=1)
    runner = ModelRunner(model, mesh, longest, tiles)
    room = runner.cache.reserve(longest)
    scores: dict[_Row, Score] = {}
    logits: list[torch.Tensor] = []
    pieces = _pieces(room, by_text, tiles)
    for tile in pack(pieces, lambda piece: len(piece[1].ids), tiles.prompt_tokens):
        for (text, work), part in zip(tile, runner.run([work for _, work in tile]), strict=True):
            if work.read:
                logits.append(part)
            if work.piece.end == len(text.ids):
                scores |= _read_off(torch.cat(logits), by_text[text])
                logits = []
    return scores


def _pieces(room: CacheSlot, texts: Iterable[_Text], tiles: Tiles) -> Iterator[tuple[_Text, Work]]:
    """Cut texts into pieces that are run one after the other, each text in place of the one before."""
    before, cuts_before = _Text((), 0), list[int]()
    for text in texts:
        cuts = text.cuts(tiles)
        # As far as both are cut alike, keys and values are those that this text would get by itself.
        most = min(common_prefix(before.ids, text.ids), text.first_place)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(cuts_before, cuts, strict=False))
        start = max((end for end, _ in same if end <= most), default=0)
        for end in (place for place in cuts if place > start):
            read = max(end - max(start, text.first_place), 0)
            yield text, Work(SequenceChunk(room, start, end - start), text.ids[start:end], read)
            start = end
        before, cuts_before = text, cuts


def _rows(tokenizer: Tokenizer, pairs: Sequence[Pair], max_tokens: int) -> list[_Row]:
    moved = [_spaces_to_continuation(pair) for pair in pairs]
    texts = list(
        dict.fromkeys(text for context, continuation in moved for text in (context, context + continuation))
    )
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    rows = []
    for context, continuation in moved:
        whole, cut = ids[context + continuation], len(ids[context])
        before, after = whole[:cut], whole[cut:]
        if not before:
            before = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None][:1]
        if not before:
            raise AscendSpeedError(
                f"the context before {continuation[:40]!r} has no token, and the tokenizer has neither a begin nor an "
                "end of text; give a context"
            )
        if len(after) > max_tokens:
            raise AscendSpeedError(
                f"the continuation {continuation[:40]!r} has {len(after)} tokens, more than the {max_tokens} that "
                "the model takes; no score of a part would be its score"
            )
        if not after:
            raise AscendSpeedError(
                f"the continuation {continuation[:40]!r} has no token; there is nothing to score"
            )
        both = before + after
        truncated = max(len(both) - (max_tokens + 1), 0)
        rows.append(_Row(tuple(both[truncated:]), len(after), truncated))
    return rows


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenize a pair as one text and cut it where the context's own tokens end."""
    context, continuation = _spaces_to_continuation(Pair(context, continuation))
    whole = tokenizer.encode(context + continuation)
    cut = len(tokenizer.encode(context))
    return whole[:cut], whole[cut:]


def _spaces_to_continuation(pair: Pair) -> tuple[str, str]:
    """Count spaces at the end of the context to the continuation, where tokenizers put them.

    The rule of lm-evaluation-harness.
    """
    kept = len(pair.context.rstrip())
    return pair.context[:kept], pair.context[kept:] + pair.continuation


def _read_off(logits: torch.Tensor, rows: Sequence[_Row]) -> dict[_Row, Score]:
    """Add up the log-probabilities of continuations of one text; logits of its last places, [P, V]."""
    wide = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)
    scores = {}
    for row in rows:
        mine = wide[len(wide) - row.num_continuation :]
        targets = torch.tensor(row.ids[len(row.ids) - row.num_continuation :], device=logits.device)
        chosen = mine.gather(-1, targets.unsqueeze(-1)).sum()
        is_greedy = bool((mine.argmax(dim=-1) == targets).all())
        scores[row] = Score(float(chosen), is_greedy, row.truncated_tokens)
    return scores
