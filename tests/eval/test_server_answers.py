"""What servers answer is checked: the tokens of an echoed prompt, shapes, pauses, headers, further keys."""

import json
import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendspeed_eval.errors import UsageError
from ascendspeed_eval.openai_server import check_address, read_extra_body, read_headers
from ascendspeed_eval.server.answers import AnswerError, continuation_of, parse_answer
from ascendspeed_eval.server.client import retry_after_seconds
from ascendspeed_eval.server.echo import Echo, continuation_tokens, read_echo, tokens_by_text
from support.tables import ReportTables


def pieces(draw: random.Random, data: bytes) -> list[bytes]:
    """Cut bytes anywhere, also inside characters, as tokenizers of bytes do."""
    found, start = [], 0
    while start < len(data):
        end = min(start + draw.randint(1, 6), len(data))
        found.append(data[start:end])
        start = end
    return found


def byte_level_names() -> dict[int, str]:
    """The table of GPT-2's encoder.py, written from its source."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in own}
    count = 0
    for byte in range(256):
        if byte not in names:
            names[byte] = chr(256 + count)
            count += 1
    return names


NAMES = byte_level_names()
WAYS = {
    "text": lambda piece: piece.decode("utf-8", "replace"),
    "bytes": lambda piece: (
        piece.decode() if is_text(piece) else "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
    ),
    "byte-level": lambda piece: "".join(NAMES[byte] for byte in piece),
    "sentencepiece": lambda piece: (
        piece.decode().replace(" ", "\u2581") if is_text(piece) else piece.decode("utf-8", "replace")
    ),
}


def is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n的中\U0001f600é\ufffdA")),
    min_size=1,
    max_size=40,
)


def test_tokens_are_placed_by_their_own_text(report: ReportTables) -> None:
    """Texts cut at random into tokens of bytes, named in four ways: the right tokens, or none, never others."""
    counts = dict.fromkeys(("tried", "placed", "undecided", "wrong"), 0)

    @settings(max_examples=400, deadline=None, database=None, derandomize=True)
    @given(TEXTS, TEXTS, st.sampled_from(sorted(WAYS)), st.integers(0, 2), st.randoms(use_true_random=False))
    def try_one(context: str, continuation: str, way: str, leading: int, draw: random.Random) -> None:
        text, kept = context + continuation, len(context.rstrip())
        cut = pieces(draw, text.encode())
        border, ends = len(text[:kept].encode()), []
        for piece in cut:
            ends.append((ends[-1] if ends else 0) + len(piece))
        wanted = [number + leading for number, end in enumerate(ends) if end > border]
        names = [*["<s>", "<|begin|>"][:leading], *map(WAYS[way], cut), " the"]
        found = tokens_by_text(names, text, kept)
        counts["tried"] += 1
        counts["undecided"] += found is None
        counts["placed"] += found is not None and list(found) == wanted
        counts["wrong"] += found is not None and list(found) != wanted

    try_one()
    report.add("Tokens of an echoed prompt, placed by their text", tuple(counts), *counts.values())
    assert counts["wrong"] == 0
    assert counts["placed"] > 0.7 * counts["tried"]


def echo_of(names: list[str], values: list[float | None], usage: int | None = 1) -> Echo:
    tops = [None if one is None else {name: one} for name, one in zip(names, values, strict=True)]
    logprobs = {"tokens": names, "token_logprobs": values, "top_logprobs": tops}
    answer = {"choices": [{"text": "", "logprobs": logprobs}], "usage": {"completion_tokens": usage}}
    return read_echo(parse_answer(json.dumps(answer).encode()), "prompt")


def test_the_context_alone_places_tokens_that_have_ids_for_names() -> None:
    whole = echo_of([f"token_id:{n}" for n in (1, 5, 6, 7, 8, 9)], [None, -1, -2, -3, -4, -5])
    context = echo_of([f"token_id:{n}" for n in (1, 5, 6, 4)], [None, -1, -2, -9])
    assert continuation_tokens(whole, "ab cd", 2, lambda: context) == range(3, 5)
    # The last token of the context joins the continuation: it counts to the continuation.
    joined = echo_of([f"token_id:{n}" for n in (1, 5, 3, 4)], [None, -1, -2, -9])
    assert continuation_tokens(whole, "ab cd", 2, lambda: joined) == range(2, 5)
    other = echo_of([f"token_id:{n}" for n in (1, 2, 3, 4, 9, 9)], [None, -1, -2, -9, -1, -1])
    for one, context_alone in ((whole, lambda: other), (whole, None)):
        with pytest.raises(AnswerError, match="do not spell the prompt"):
            continuation_tokens(one, "ab cd", 2, context_alone)
    unknown = echo_of([f"token_id:{n}" for n in (1, 5, 6, 7)], [None, -1, -2, -3], usage=None)
    with pytest.raises(AnswerError, match="do not spell the prompt"):
        continuation_tokens(unknown, "ab cd", 2, lambda: context)


BAD_ECHOES = {
    "a list too short": (["a", "b"], [None], "2 tokens and 1"),
    "positive": (["a", "b", "c"], [None, 0.5, -1], "0.5 for a log-probability"),
    "infinite": (["a", "b", "c"], [None, -1e999, -1], "no number"),
    "of the next tokens": (["a", "b", "c"], [-1, -2, None], "of the next tokens"),
    "none": ([], [], "no tokens"),
}


@pytest.mark.parametrize("case", BAD_ECHOES)
def test_impossible_log_probabilities_are_refused(case: str) -> None:
    names, values, complaint = BAD_ECHOES[case]
    answer = {"choices": [{"text": "abc", "logprobs": {"tokens": names, "token_logprobs": values}}]}
    with pytest.raises(AnswerError, match=complaint):
        read_echo(parse_answer(json.dumps(answer).encode()), "ab")


def test_log_probabilities_that_top_logprobs_disprove_are_refused() -> None:
    names = list("abcdef")
    values: list[float | None] = [None, -1.0, -2.0, -3.0, -4.0, -5.0]
    tops = [None if one is None else {name: one} for name, one in zip(names, values, strict=True)]
    for changed_values, changed_tops in (
        ([None, -2.0, -3.0, -4.0, -5.0, -0.5], tops),
        ([None, *values[2:], -1.0], [None, *tops[2:], {"g": -1.0}]),
    ):
        logprobs = {"tokens": names, "token_logprobs": changed_values, "top_logprobs": changed_tops}
        answer = {"choices": [{"text": "abcdef", "logprobs": logprobs}]}
        with pytest.raises(AnswerError, match="shifted"):
            read_echo(parse_answer(json.dumps(answer).encode()), "abcde")


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("\ud83d")),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(
                    ["choices", "text", "message", "content", "finish_reason", "logprobs", "tokens", "error", "code",
                     "token_logprobs", "top_logprobs", "usage", "completion_tokens", "type", "object", "detail"]
                ),
                inner,
            ),
        ),
        max_leaves=20,
    ),
    st.binary(max_size=20),
    st.booleans(),
)  # fmt: skip
def test_no_answer_is_more_than_one_kind_of_error(content: object, noise: bytes, is_chat: bool) -> None:
    for data in (json.dumps(content).encode(), noise, json.dumps({"choices": [content]}).encode()):
        try:
            answer = parse_answer(data)
            continuation_of(answer, is_chat)
            read_echo(answer, "prompt")
        except AnswerError as error:
            assert "\n" not in error.problem


def chat(**message: object) -> bytes:
    return json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()


def test_messages_in_all_forms_are_read() -> None:
    def read(**message: object) -> tuple[str, str, str]:
        found = continuation_of(parse_answer(chat(**message)), True)
        return found.text, found.finish_reason, found.reasoning

    assert read(content="a") == ("a", "stop", "")
    assert read(content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == ("ab", "stop", "")
    assert read(content=None, reasoning_content="hm") == ("", "stop", "hm")
    assert read(content="a", reasoning="hm") == ("a", "stop", "hm")
    assert read(content=None, refusal="I cannot") == ("", "refusal", "")
    assert read(content="half \ud83d") == ("half \ud83d", "stop", "")
    with pytest.raises(AnswerError, match="no content"):
        read(content=None)
    with pytest.raises(AnswerError, match="image_url"):
        read(content=[{"type": "image_url"}])


def test_pauses_are_read_as_seconds_and_as_dates() -> None:
    now = datetime(2026, 11, 27, 4, 0, tzinfo=UTC)
    clock = format_datetime(now, usegmt=True)
    later = format_datetime(now + timedelta(seconds=90), usegmt=True)
    assert retry_after_seconds("2.5") == 2.5
    assert retry_after_seconds(later, clock) == 90
    assert retry_after_seconds(clock, later) == 0
    for odd in (None, "", "soon", "-3", "nan", "inf", "Wed, 99 Foo 2026"):
        assert retry_after_seconds(odd, clock) == 0


def test_headers_and_further_keys_are_checked() -> None:
    assert read_headers(["X-Key: a: b", "Other:c"]) == {"X-Key": "a: b", "Other": "c"}
    for line in ("no colon", "bad name: x", "X-Key: é", "X: a\nY: b", ": x"):
        with pytest.raises(UsageError) as refused:
            read_headers([line])
        assert "é" not in str(refused.value)
    assert read_extra_body('{"top_k": 20, "stop": null}') == {"top_k": 20, "stop": None}
    for text in ("[1]", "{", '{"prompt": "x"}', '{"a": NaN}', '{"stream": true}'):
        with pytest.raises(UsageError, match="extra_body"):
            read_extra_body(text)
    assert check_address("http://user:word@host:8000/v1/") == "http://host:8000/v1/"
    for text in ("host:8000/v1", "ftp://host/v1", "http://", "http://host/v1?key=word"):
        with pytest.raises(UsageError, match="base_url") as refused:
            check_address(text)
        assert "word" not in str(refused.value)
