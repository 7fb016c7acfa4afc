"""Log-likelihoods of continuations: what benchmark scores stand on.

Three things save work and none changes a decision: texts that are the same but for their last token are computed once;
a beginning that many texts share (the examples of a prompt) is computed once and kept as keys and values; logits are
computed only where a continuation stands. Which texts are computed together changes the last bits of a sum, so where
two continuations of one context are nearly equally likely, they are computed again, each alone: decisions do not depend
on batch size, order or the number of devices.

Shapes: B batch, S sequence, P places, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ascendspeed_core.models.cache import KeyValueCache
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.generation import NEARLY_EQUAL, make_cache

SHORTEST_PREFIX_TOKENS = 32
"""A shorter beginning is not worth keeping."""


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
        shared_characters: beginning of the context that other pairs have too.
    """

    context: str
    continuation: str
    shared_characters: int = 0


@dataclass(frozen=True)
class _Row:
    """A tokenized pair, cut to what the model can take.

    Attributes:
        ids: of context and continuation.
        num_continuation: ids of the continuation.
        truncated_tokens: ids of the context that were left out.
        num_prefix: first ids that are kept as keys and values for other rows.
    """

    ids: tuple[int, ...]
    num_continuation: int
    truncated_tokens: int
    num_prefix: int

    @property
    def read(self) -> tuple[int, ...]:
        """What the model reads: all but the last id."""
        return self.ids[:-1]

    @property
    def prefix(self) -> tuple[int, ...]:
        """The beginning that is shared."""
        return self.ids[: self.num_prefix]


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
        batch_size: texts computed at once.
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
    rows = [_Row((*before, *after), len(after), 0, 0) for before, after in pairs]
    scores = _score_all(model, mesh, rows, batch_size)
    return [scores[row] for row in rows]


def _score_all(
    model: Transformer, mesh: ParallelMesh, rows: Sequence[_Row], batch_size: int
) -> dict[_Row, Score]:
    scores: dict[_Row, Score] = {}
    # Longest first: what does not fit into memory says so at once.
    ordered = sorted(dict.fromkeys(rows), key=lambda row: (row.prefix, -len(row.ids), row.ids))
    for _, group in groupby(ordered, key=lambda row: row.prefix):
        cache: KeyValueCache | None = None
        for batch in _batches(list(group), batch_size):
            if batch[0].num_prefix and cache is None:
                cache = _read_prefix(model, mesh, batch[0].prefix)
            scores |= _score(model, mesh, batch, cache)
    return scores


def _rows(tokenizer: Tokenizer, pairs: Sequence[Pair], max_tokens: int) -> list[_Row]:
    moved = [_spaces_to_continuation(pair) for pair in pairs]
    texts = list(
        dict.fromkeys(text for context, continuation in moved for text in (context, context + continuation))
    )
    heads = list(
        dict.fromkeys(pair.context[: pair.shared_characters] for pair in pairs if pair.shared_characters)
    )
    ids = dict(zip([*texts, *heads], tokenizer.encode_batch([*texts, *heads]), strict=True))
    rows = []
    for pair, (context, continuation) in zip(pairs, moved, strict=True):
        whole, cut = ids[context + continuation], len(ids[context])
        before, after = whole[:cut], whole[cut:]
        if not before:
            before = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None][:1]
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
        shared = (
            ids[pair.context[: pair.shared_characters]] if pair.shared_characters and not truncated else []
        )
        prefix = _common(shared, before)
        rows.append(
            _Row(
                tuple(both[truncated:]),
                len(after),
                truncated,
                prefix if prefix >= SHORTEST_PREFIX_TOKENS else 0,
            )
        )
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


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two texts have in common at their beginning, less the last of the second."""
    length = min(len(first), len(second) - 1)
    return next((n for n in range(length) if first[n] != second[n]), max(length, 0))


def _batches(rows: Sequence[_Row], batch_size: int) -> Iterator[list[_Row]]:
    """Put rows together that read the same ids, and then as many texts as fit into a batch."""
    texts = [list(group) for _, group in groupby(rows, key=lambda row: row.read)]
    for start in range(0, len(texts), batch_size):
        yield [row for text in texts[start : start + batch_size] for row in text]


def _read_prefix(model: Transformer, mesh: ParallelMesh, prefix: Sequence[int]) -> KeyValueCache:
    """Return the keys and values of a beginning."""
    cache = make_cache(model, mesh, 1, len(prefix))
    device = mesh.device.torch
    tokens = torch.tensor([list(prefix)], device=device)
    nowhere = torch.zeros(1, 1, dtype=torch.long, device=device)
    forward_through_stages(model, mesh, tokens, cache, nowhere)
    return cache


def _score(
    model: Transformer, mesh: ParallelMesh, rows: Sequence[_Row], prefix: KeyValueCache | None
) -> dict[_Row, Score]:
    """Run one batch and read each row's continuation off its logits."""
    texts = list(dict.fromkeys(row.read for row in rows))
    skipped = rows[0].num_prefix
    length = max(len(text) for text in texts) - skipped
    tokens = torch.zeros(len(texts), length, dtype=torch.long)
    for place, text in enumerate(texts):
        tokens[place, : len(text) - skipped] = torch.tensor(text[skipped:])
    # Padding at the end: causal attention never looks at it.
    width = max(row.num_continuation for row in rows)
    ends = torch.tensor([len(text) - skipped for text in texts])
    places = (ends.unsqueeze(1) - width + torch.arange(width)).clamp(min=0)
    cache = _with_prefix(model, mesh, prefix, len(texts), length)
    device = mesh.device.torch
    logits = forward_through_stages(model, mesh, tokens.to(device), cache, places.to(device))
    whole = gather_logits(logits, model.config.vocab_size, mesh.group("tp"))
    wide = whole if whole.dtype == torch.float64 else whole.float()
    number = {text: place for place, text in enumerate(texts)}
    return {row: _read_off(wide[number[row.read], width - row.num_continuation :], row) for row in rows}


def _with_prefix(
    model: Transformer, mesh: ParallelMesh, prefix: KeyValueCache | None, batch_size: int, length: int
) -> KeyValueCache | None:
    """Return a cache for each text of a batch that begins with the shared keys and values."""
    if prefix is None:
        return None
    cache = make_cache(model, mesh, batch_size, prefix.length_tokens + length)
    cache.keys[:, :, :, : prefix.length_tokens] = prefix.keys
    cache.values[:, :, :, : prefix.length_tokens] = prefix.values
    cache.advance(prefix.length_tokens)
    return cache


def _read_off(logits: torch.Tensor, row: _Row) -> Score:
    """Add up a continuation's log-probabilities, [P, V] -> a score."""
    targets = torch.tensor(row.ids[len(row.ids) - row.num_continuation :], device=logits.device)
    chosen = logits.log_softmax(dim=-1).gather(-1, targets.unsqueeze(-1)).sum()
    is_greedy = bool((logits.argmax(dim=-1) == targets).all())
    return Score(float(chosen), is_greedy, row.truncated_tokens)


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
            alone = _Row(row.ids, row.num_continuation, row.truncated_tokens, 0)
            scores[row] = _score(model, mesh, [alone], None)[alone]
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
