"""Find the tokens of a continuation in a prompt that a server sent back with log-probabilities.

A server's `text_offset` is not believed: vLLM counts a first piece such as `<s>` in it, with token ids as names it
counts these names, and with pieces of a byte each piece as a character. Where offsets are right, the tokens themselves
give the text, so that is what is checked: the names, one after the other, must spell the whole prompt. Names may be
texts, pieces as SentencePiece or byte-level BPE write them, or bytes. Where they do not spell it, as with token ids for
names, the tokens of the context alone, for which the server is asked too, tell where the continuation begins.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from ascendspeed_eval.server.answers import Answer, AnswerError, LogProbs

MAX_LEADING_PIECES = 2
"""Pieces before the text that are not of it, such as `<s>`."""
AGREEMENT = 1e-3
"""Log-probabilities of one token that differ by more are not the same number: servers print at least 4 digits."""
_BYTES_NAME = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Spell = Callable[[str], list[bytes | None]]
"""From the name of a token to the parts it spells; `None` stands for one to three bytes of incomplete characters."""


@dataclass(frozen=True)
class Echo:
    """A prompt as a server sent it back.

    Attributes:
        found: tokens and log-probabilities.
        num_generated: tokens after the prompt; `None` if nothing tells.
    """

    found: LogProbs
    num_generated: int | None

    @property
    def num_prompt_tokens(self) -> int | None:
        """Tokens of the prompt, if it is known which were generated."""
        return None if self.num_generated is None else len(self.found.tokens) - self.num_generated


def read_echo(answer: Answer, prompt: str) -> Echo:
    """Return the prompt's tokens and log-probabilities.

    Raises:
        AnswerError: there are none, or they contradict each other.
    """
    found = answer.choice.logprobs
    if found is None:
        raise AnswerError(
            "it returns no log-probabilities of the prompt (echo with logprobs); choose a protocol that generates text",
            is_temporary=False,
        )
    count = len(found.tokens)
    for name, values in (("token_logprobs", found.token_logprobs), ("top_logprobs", found.top_logprobs)):
        if values is not None and len(values) != count:
            raise AnswerError(f"its answer has {count} tokens and {len(values)} {name}")
    _check_values(found)
    return Echo(found, _num_generated(answer, prompt))


def _num_generated(answer: Answer, prompt: str) -> int | None:
    """Return how many tokens follow the prompt: as the server counts, or as the text of the answer shows."""
    if answer.usage is not None and answer.usage.completion_tokens is not None:
        counted = answer.usage.completion_tokens
        return counted if 0 <= counted <= 1 else None
    text = answer.choice.text or ""
    return 1 if prompt in text and not text.endswith(prompt) else None


def _check_values(found: LogProbs) -> None:
    values = found.token_logprobs
    if not values:
        raise AnswerError("its answer has no tokens")
    wrong = next(
        (one for one in values if one is not None and (not math.isfinite(one) or one > AGREEMENT)), None
    )
    if wrong is not None:
        raise AnswerError(f"its answer has {wrong} for a log-probability, which is not finite and at most 0")
    if values[0] is not None and values[-1] is None:
        raise AnswerError("its log-probabilities are those of the next tokens: the last token has none")
    agree = other = 0
    tops = found.top_logprobs or [None] * len(values)
    for number, (name, value, top) in enumerate(zip(found.tokens, values, tops, strict=True)):
        if value is None or not top:
            continue
        following = found.tokens[number + 1] if number + 1 < len(values) else None
        if name in top:
            # Several tokens may have one name, such as U+FFFD, so one that differs says little.
            agree, other = (agree + 1, other) if abs(top[name] - value) <= AGREEMENT else (agree, other + 1)
        elif following in top and abs(top[following] - value) <= AGREEMENT:
            other += 1
    if other > agree:
        raise AnswerError(
            "its log-probabilities are not those of its tokens: they are shifted against top_logprobs"
        )


def continuation_tokens(
    echo: Echo, text: str, kept: int, echo_of_context: Callable[[], Echo] | None
) -> range:
    """Return the numbers of the tokens that lie after the first `kept` characters of a prompt, or across that border.

    Args:
        echo: of the whole prompt.
        text: the whole prompt.
        kept: characters of the context, without spaces at its end, which count to the continuation.
        echo_of_context: asks the server for those characters alone; `None` if there are none.

    Raises:
        AnswerError: nothing tells which tokens these are.
    """
    own = tokens_by_text(echo.found.tokens, text, kept)
    if own is None and echo_of_context is not None:
        own = _tokens_by_context(echo, echo_of_context())
    if own is None:
        raise AnswerError(
            "its tokens do not spell the prompt, and the tokens of the context alone do not tell where the "
            "continuation begins; choose a protocol that generates text",
            is_temporary=False,
        )
    return own


def _tokens_by_context(whole: Echo, context: Echo) -> range | None:
    """Count the tokens that the whole prompt and its context have in common."""
    end, num_context = whole.num_prompt_tokens, context.num_prompt_tokens
    if end is None or num_context is None:
        return None
    pairs = zip(whole.found.tokens[:end], context.found.tokens[:num_context], strict=False)
    common = 0
    for ours, theirs in pairs:
        if ours != theirs:
            break
        common += 1
    # The last tokens of the context may have joined the continuation's; if more differ, it is another text.
    return range(common, end) if num_context - common <= MAX_LEADING_PIECES and common < end else None


def tokens_by_text(names: Sequence[str], text: str, kept: int) -> range | None:
    """Return the tokens of a continuation if the names of tokens spell a text; see `continuation_tokens`."""
    data, before = text.encode("utf-8", "surrogatepass"), len(text[:kept].encode("utf-8", "surrogatepass"))
    spellings: list[Spell] = [_spell_text, _spell_sentencepiece, _spell_byte_level]
    for spell in spellings:
        parts = [spell(name) for name in names]
        for skipped in range(MAX_LEADING_PIECES + 1):
            # SentencePiece puts a space before a text, and a server may show it, or leave out one that is there.
            for whole, border in (
                (data, before),
                (b" " + data, before + 1),
                (data.removeprefix(b" "), before - 1),
            ):
                ends = token_ends(parts[skipped:], whole)
                if ends is not None:
                    own = _after_border(ends, border)
                    return None if own is None else range(own.start + skipped, own.stop + skipped)
    return None


def _spell_text(name: str) -> list[bytes | None]:
    found = _BYTES_NAME.fullmatch(name)
    if found:
        return [bytes.fromhex(found[1].replace("\\x", ""))]
    parts: list[bytes | None] = []
    for part in re.split("(\ufffd)", name):
        parts += [None] if part == "\ufffd" else [part.encode("utf-8", "surrogatepass")] if part else []
    return parts


def _spell_sentencepiece(name: str) -> list[bytes | None]:
    found = _BYTE_PIECE.fullmatch(name)
    return [bytes([int(found[1], 16)])] if found else _spell_text(name.replace("\u2581", " "))


def _spell_byte_level(name: str) -> list[bytes | None]:
    table = _byte_level_table()
    return [bytes(table[c] for c in name)] if all(c in table for c in name) else _spell_text(name)


@cache
def _byte_level_table() -> dict[str, int]:
    """Return the byte that each character of a byte-level piece stands for (Radford et al., 2019, encoder.py)."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}


def token_ends(parts: Sequence[Sequence[bytes | None]], data: bytes) -> list[int] | None:
    """Return, for each token of a prompt, where it can end, as a set of bits; `None` if they cannot spell the prompt.

    The last token may have been generated after the prompt. Positions are bits of an integer, so that hundreds of
    incomplete characters in a row cost little.
    """
    high = sum(1 << number for number, byte in enumerate(data) if byte >= 0x80)
    reached = [1]
    for spelled in parts:
        reached.append(_forward(reached[-1], spelled, data, high))
    end = 1 << len(data)
    count = next((n for n in (len(parts) - 1, len(parts)) if n > 0 and reached[n] & end), None)
    if count is None:
        return None
    ends = [end]
    for number in range(count - 1, 0, -1):
        ends.append(_backward(ends[-1], parts[number], data, high) & reached[number])
    return ends[::-1]


def _bits(positions: int) -> list[int]:
    found = []
    while positions:
        lowest = positions & -positions
        found.append(lowest.bit_length() - 1)
        positions ^= lowest
    return found


def _forward(positions: int, parts: Sequence[bytes | None], data: bytes, high: int) -> int:
    for part in parts:
        if part is None:
            one = (positions & high) << 1
            two = (one & high) << 1
            positions = one | two | (two & high) << 1
        else:
            positions = sum(1 << (p + len(part)) for p in _bits(positions) if data.startswith(part, p))
    return positions


def _backward(positions: int, parts: Sequence[bytes | None], data: bytes, high: int) -> int:
    for part in reversed(parts):
        if part is None:
            one = positions >> 1 & high
            two = one >> 1 & high
            positions = one | two | (two >> 1 & high)
        else:
            starts = [p - len(part) for p in _bits(positions)]
            positions = sum(1 << p for p in starts if p >= 0 and data.startswith(part, p))
    return positions


def _after_border(ends: Sequence[int], border: int) -> range | None:
    """Return the tokens that end after a border; `None` if one may end on either side of it.

    A token without text just before the border may be the first byte of what follows it.
    """
    within = (1 << (max(border, 0) + 1)) - 1
    for number, own in enumerate(ends):
        if own & ~within:
            is_sure = not own & within
            has_empty = border > 0 and number > 1 and ends[number - 1] == ends[number - 2] == 1 << border
            return range(number, len(ends)) if is_sure and not has_empty else None
    return None
