"""Tokens of prompts by id, from servers that tell them: then nothing about tokens is guessed.

vLLM and `asd-infer serve` answer `/tokenize`, beside `/v1`, with the ids of a text, and take ids as prompts. What such
a server scores are the ids that a model in this process would score: the context and the continuation as one text, cut
where the tokens of the context alone end.
"""

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from ascendspeed_eval.errors import EvaluationError


class TokenizedText(BaseModel):
    """An answer of `/tokenize`.

    Attributes:
        tokens: ids of the text.
        count: how many; other servers with such a path do not send it.
        max_model_len: most ids of a prompt.
        max_scored_tokens: most ids of a prompt that is only scored; `max_model_len` if it is not told.
        start_token_id: stands before a text without a context; `None` if it is not told.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    tokens: list[int]
    count: int
    max_model_len: int
    max_scored_tokens: int | None = None
    start_token_id: int | None = None


@dataclass(frozen=True)
class ScoredIds:
    """What a server is to score.

    Attributes:
        ids: of context and continuation.
        num_continuation: how many of them are the continuation's.
        truncated_tokens: ids of the context that were left out.
    """

    ids: list[int]
    num_continuation: int
    truncated_tokens: int


def read_tokenized(content: bytes) -> TokenizedText | None:
    """Return what `/tokenize` answered; `None` if it is something else."""
    try:
        found = TokenizedText.model_validate_json(content)
    except ValueError:
        return None
    return found if found.count == len(found.tokens) else None


def ids_to_score(context: str, text: str, tokenize: Callable[[str], TokenizedText], where: str) -> ScoredIds:
    """Return the ids of a text, and which of them lie after the context's own.

    Args:
        context: without spaces at its end, which count to the continuation.
        text: context and continuation.
        tokenize: asks the server.
        where: the server, for messages.

    Raises:
        EvaluationError: there is nothing to score, or it is too long.
    """
    whole, alone = tokenize(text), tokenize(context)
    cut = len(alone.tokens)
    before, after = whole.tokens[:cut], whole.tokens[cut:]
    if not before and whole.start_token_id is not None:
        before = [whole.start_token_id]
    limit = whole.max_scored_tokens or whole.max_model_len
    shown = text[len(context) :][:40]
    if not before or not after:
        missing = "context before" if not before else "token in"
        raise EvaluationError(
            f"{where}: there is no {missing} the continuation {shown!r}, so it has no score"
        )
    if len(after) >= limit:
        raise EvaluationError(
            f"{where}: the continuation {shown!r} has {len(after)} tokens, more than the {limit - 1} that the model "
            "takes"
        )
    both = before + after
    truncated = max(len(both) - limit, 0)
    return ScoredIds(both[truncated:], len(after), truncated)
