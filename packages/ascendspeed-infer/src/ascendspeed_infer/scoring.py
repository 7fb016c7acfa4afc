"""Log-likelihoods of continuations: what benchmark scores stand on.

Texts are scored in the order of their ids, all in one room of the cache, so that each runs only what it does not have
in common with the one before: the examples that many prompts share, and a context with several continuations, are
computed once. Logits are computed only where a continuation stands.

Which texts are computed together changes the last bits of a sum, so where two continuations of one context are nearly
equally likely, they are computed again, each alone: decisions do not depend on batch size, order or the number of
devices.

Shapes: P places, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ascendspeed_core.models.cache import Piece, Room
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.engine.runner import ModelRunner, Work
from ascendspeed_infer.engine.scheduler import common_beginning

NEARLY_EQUAL = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Differences of log-likelihoods that company could turn round: far above the noise of each format."""

TOKENS_PER_PASS = 512
"""Beyond this the matrix products gain nothing, and logits take memory."""


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
    def read(self) -> tuple[int, ...]:
        """What the model reads: all but the last id."""
        return self.ids[:-1]

    @property
    def first_place(self) -> int:
        """The first place whose logits are wanted."""
        return len(self.ids) - self.num_continuation - 1


@torch.no_grad()
def loglikelihood(
    model: Transformer,
    mesh: ParallelMesh,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    batch_size: int,
    max_tokens: int,
) -> list[Score]:
    """Score continuations after their contexts.

    Args:
        model: this process's part.
        mesh: its place; all processes of a tensor-parallel group and all stages call alike.
        tokenizer: of the model.
        pairs: what is scored.
        batch_size: texts computed in one pass at most.
        max_tokens: longest input; longer ones lose the beginning of their context, which is counted.

    Raises:
        AscendSpeedError: a continuation alone is longer than `max_tokens`.
    """
    rows = _rows(tokenizer, pairs, max_tokens)
    scores = _score_all(model, mesh, rows, batch_size)
    _settle(model, mesh, pairs, rows, scores)
    return [scores[row] for row in rows]


@torch.no_grad()
def loglikelihood_of_ids(
    model: Transformer,
    mesh: ParallelMesh,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int,
) -> list[Score]:
    """Score ids after ids; see `loglikelihood`."""
    rows = [_Row((*before, *after), len(after), 0) for before, after in pairs]
    scores = _score_all(model, mesh, rows, batch_size)
    return [scores[row] for row in rows]


def _score_all(
    model: Transformer, mesh: ParallelMesh, rows: Sequence[_Row], batch_size: int
) -> dict[_Row, Score]:
    by_text: dict[tuple[int, ...], list[_Row]] = {}
    for row in sorted(set(rows), key=lambda row: row.ids):
        by_text.setdefault(row.read, []).append(row)
    longest = max((len(text) for text in by_text), default=1)
    runner = ModelRunner(model, mesh, longest)
    room = runner.cache.reserve(longest)
    scores: dict[_Row, Score] = {}
    logits: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for works in _passes(room, by_text, batch_size):
        for (text, is_last, _), part in zip(works, runner.run([work for *_, work in works]), strict=True):
            logits.setdefault(text, []).append(part)
            if is_last:
                scores |= _read_off(torch.cat(logits.pop(text)), by_text[text])
    return scores


_TextWork = tuple[tuple[int, ...], bool, Work]
"""A text, whether it ends with this piece, and the piece."""


def _passes(
    room: Room, by_text: Mapping[tuple[int, ...], Sequence[_Row]], batch_size: int
) -> Iterator[list[_TextWork]]:
    """Cut texts into pieces, and put pieces together that are run in one pass."""
    before: tuple[int, ...] = ()
    works: list[_TextWork] = []
    left, texts = TOKENS_PER_PASS, 0
    for text, rows in by_text.items():
        first_place = min(row.first_place for row in rows)
        start = min(common_beginning(before, text), first_place)
        while start < len(text):
            count = min(len(text) - start, left)
            read = max(min(start + count - first_place, count), 0)
            piece = Piece(room, start, count)
            start += count
            left -= count
            works.append((text, start == len(text), Work(piece, text[start - count : start], read)))
            texts += start == len(text)
            if left == 0 or texts == batch_size:
                yield works
                works, left, texts = [], TOKENS_PER_PASS, 0
        before = text
    if works:
        yield works


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


def _settle(
    model: Transformer,
    mesh: ParallelMesh,
    pairs: Sequence[Pair],
    rows: Sequence[_Row],
    scores: dict[_Row, Score],
) -> None:
    """Compute the continuations of a context again, each alone and on one thread, where the best are nearly equal."""
    margin = NEARLY_EQUAL[next(model.parameters()).dtype]
    by_context: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        by_context.setdefault(pair.context, []).append(number)
    unsure = [
        rows[number]
        for numbers in by_context.values()
        if _is_close(((scores[rows[n]].logprob, len(pairs[n].continuation.strip())) for n in numbers), margin)
        for number in numbers
    ]
    if not unsure:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for row in dict.fromkeys(unsure):
            scores |= _score_all(model, mesh, [row], 1)
    finally:
        torch.set_num_threads(threads)


def _is_close(found: Iterable[tuple[float, int]], margin: float) -> bool:
    """Tell whether the best two are nearly equal, as they are or per character."""
    values = list(found)
    if len(values) < 2:
        return False
    plain = sorted((value for value, _ in values), reverse=True)
    characters = sorted(((value / max(length, 1), length) for value, length in values), reverse=True)
    (best, length), (second, other) = characters[:2]
    return plain[0] - plain[1] < margin or best - second < margin / max(min(length, other), 1)
