"""Log-likelihoods of continuations, which benchmark scores are made of: from texts to what the engine scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.engine.scoring_request import Score, ScoringInput

__all__ = [
    "IdPair",
    "Score",
    "TextPair",
    "check_finite_scores",
    "encode_pair",
    "inputs_of_ids",
    "inputs_of_texts",
    "inputs_or_errors",
]


@dataclass(frozen=True)
class TextPair:
    """What is scored.

    Attributes:
        context: the text before.
        continuation: the text whose likelihood is wanted.
    """

    context: str
    continuation: str


@dataclass(frozen=True)
class IdPair:
    """What is scored, as ids.

    Attributes:
        context: the ids before.
        continuation: the ids whose likelihood is wanted.
        text: of the continuation, for messages.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    text: str = ""


def inputs_of_texts(tokenizer: Tokenizer, pairs: Sequence[TextPair], max_tokens: int) -> list[ScoringInput]:
    """Tokenize pairs; each text once, however many pairs have it.

    Args:
        tokenizer: of the model.
        pairs: what is scored.
        max_tokens: longest input; longer ones lose the beginning of their context, which is counted.

    Raises:
        AscendSpeedError: a continuation alone is longer than `max_tokens`, or has nothing before it.
    """
    inputs = []
    for one in inputs_or_errors(tokenizer, pairs, max_tokens):
        if isinstance(one, AscendSpeedError):
            raise one
        inputs.append(one)
    return inputs


def inputs_or_errors(
    tokenizer: Tokenizer, pairs: Sequence["TextPair | IdPair"], max_tokens: int
) -> list[ScoringInput | AscendSpeedError]:
    """Tokenize pairs as `inputs_of_texts` does; an error of one stands in its place. Pairs of ids stay as they are."""
    moved = [one if isinstance(one, IdPair) else _spaces_to_continuation(one) for one in pairs]
    texts = list(
        dict.fromkeys(
            text for one in moved if not isinstance(one, IdPair) for text in (one[0], one[0] + one[1])
        )
    )
    ids = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    inputs: list[ScoringInput | AscendSpeedError] = []
    for one in moved:
        if isinstance(one, IdPair):
            before, after, continuation = list(one.context), list(one.continuation), one.text
        else:
            context, continuation = one
            whole, cut = ids[context + continuation], len(ids[context])
            before, after = whole[:cut], whole[cut:]
        if not before:
            before = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None][:1]
        problem = None
        if not before:
            problem = (
                f"the context before {continuation[:40]!r} has no token, and the tokenizer has neither a begin nor an "
                "end of text; give a context"
            )
        elif len(after) > max_tokens:
            problem = (
                f"the continuation {continuation[:40]!r} has {len(after)} tokens, more than the {max_tokens} that "
                "the model takes; no score of a part would be its score"
            )
        elif not after:
            problem = f"the continuation {continuation[:40]!r} has no token; there is nothing to score"
        both = before + after
        truncated = max(len(both) - (max_tokens + 1), 0)
        inputs.append(
            ScoringInput(tuple(both[truncated:]), len(after), truncated)
            if problem is None
            else AscendSpeedError(problem)
        )
    return inputs


def inputs_of_ids(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[ScoringInput]:
    """Return pairs of ids, a context and its continuation, as the engine scores them.

    Raises:
        AscendSpeedError: one of them is empty.
    """
    for before, after in pairs:
        if not before or not after:
            raise AscendSpeedError(
                f"a pair has {len(before)} ids of context and {len(after)} of continuation; give one or more of each"
            )
    return [ScoringInput((*before, *after), len(after), 0) for before, after in pairs]


def check_finite_scores(scores: Sequence[Score]) -> list[Score]:
    """Return scores.

    Raises:
        AscendSpeedError: one is not finite.
    """
    for number, one in enumerate(scores, 1):
        if not math.isfinite(one.logprob):
            raise AscendSpeedError(
                f"the log-likelihood of pair {number} is {one.logprob}, which is not finite; look for such numbers in "
                "the checkpoint, or compute in another --dtype if it holds none"
            )
    return list(scores)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenize a pair as one text and cut it where the context's own tokens end."""
    context, continuation = _spaces_to_continuation(TextPair(context, continuation))
    whole = tokenizer.encode(context + continuation)
    cut = len(tokenizer.encode(context))
    return whole[:cut], whole[cut:]


def _spaces_to_continuation(pair: TextPair) -> tuple[str, str]:
    """Count spaces at the end of the context to the continuation, where tokenizers put them.

    The rule of lm-evaluation-harness.
    """
    kept = len(pair.context.rstrip())
    return pair.context[:kept], pair.context[kept:] + pair.continuation
