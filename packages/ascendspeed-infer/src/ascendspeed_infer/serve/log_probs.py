"""Log-probabilities of tokens in the form of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.detokenizer import ANCHOR_TOKENS, INCOMPLETE_CHARACTER
from ascendspeed_infer.engine.sequence import TokenOutput


def token_text(tokenizer: Tokenizer, before: Sequence[int], token_id: int) -> str:
    """Return what a token adds to the text of the ids before it."""
    return _added(tokenizer, before, token_id)[0]


def completion_log_probs(
    tokenizer: Tokenizer, before: Sequence[int], tokens: Sequence[TokenOutput], offset: int
) -> tuple[dict[str, Any], int]:
    """Return the `logprobs` of a piece of a completion, and the offset of the next piece.

    Args:
        tokenizer: of the model.
        before: ids before the tokens.
        tokens: to be shown.
        offset: characters of the answer before them.
    """
    ids = list(before)
    shown: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in tokens:
        text, length = _added(tokenizer, ids, one.token_id)
        shown["tokens"].append(text)
        shown["token_logprobs"].append(one.log_prob)
        shown["text_offset"].append(offset)
        shown["top_logprobs"].append(_alternatives(tokenizer, ids, one, text))
        offset += length
        ids.append(one.token_id)
    return shown, offset


def _added(tokenizer: Tokenizer, before: Sequence[int], token_id: int) -> tuple[str, int]:
    """Return the text of a token, and how much longer it makes the text before; less than 0 where it completes a
    character.
    """
    anchor = list(before[-ANCHOR_TOKENS:])
    start, whole = tokenizer.decode(anchor), tokenizer.decode([*anchor, token_id])
    text = whole[len(start) :] if whole.startswith(start) else tokenizer.decode([token_id])
    return text, len(whole) - len(start)


def _alternatives(
    tokenizer: Tokenizer, before: Sequence[int], token: TokenOutput, text: str
) -> dict[str, float] | None:
    """Return the likeliest tokens by their text, and the token itself; of equal texts the likeliest counts."""
    if token.log_prob is None:
        return None
    found: dict[str, float] = {}
    for token_id, log_prob in token.top_log_probs:
        found.setdefault(token_text(tokenizer, before, token_id), log_prob)
    found.setdefault(text, token.log_prob)
    return found


def chat_log_probs(
    tokenizer: Tokenizer, before: Sequence[int], tokens: Sequence[TokenOutput]
) -> dict[str, Any]:
    """Return the `logprobs` of a part of a chat's answer.

    Args:
        tokenizer: of the model.
        before: ids before the tokens.
        tokens: to be shown.
    """
    ids, shown = list(before), []
    for one in tokens:
        top = [_entry(tokenizer, ids, token_id, log_prob) for token_id, log_prob in one.top_log_probs]
        shown.append({**_entry(tokenizer, ids, one.token_id, one.log_prob), "top_logprobs": top})
        ids.append(one.token_id)
    return {"content": shown, "refusal": None}


def _entry(
    tokenizer: Tokenizer, before: Sequence[int], token_id: int, log_prob: float | None
) -> dict[str, Any]:
    text = token_text(tokenizer, before, token_id)
    # Of a part of a character the bytes are not known.
    known = list(text.encode()) if INCOMPLETE_CHARACTER not in text else None
    return {"token": text, "logprob": log_prob, "bytes": known}
