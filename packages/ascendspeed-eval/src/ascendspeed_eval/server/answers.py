"""What a server may answer: pydantic models of the OpenAI API's completions and chat completions.

Keys that are not used may hold anything. Texts may hold half a surrogate pair, as models write them.
"""

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from pydantic import BaseModel, ConfigDict, InstanceOf, ValidationError

Text = InstanceOf[str]
"""A str of Python; pydantic's own refuses half a surrogate pair."""

FAILED = ("error", "abort", "cancelled", "canceled")
"""Values of `finish_reason` that say that something went wrong on the server."""
WITHOUT_TEXT = ("length", "content_filter")
"""Values of `finish_reason` with which an answer may have no text."""
UNKNOWN_REASON = "unknown"
PERMANENT_CODES = range(400, 500)
TEMPORARY_CODES = (408, 409, 425, 429)
"""Statuses below 500 after which the same request may succeed."""


class AnswerError(Exception):
    """An answer is not what was asked for.

    Args:
        problem: one line.
        is_temporary: whether asking again may help.
        retry_after_seconds: the pause that the server asks for.
    """

    def __init__(self, problem: str, is_temporary: bool = True, retry_after_seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.problem, self.is_temporary = problem, is_temporary
        self.retry_after_seconds = retry_after_seconds


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class LogProbs(_Part):
    """Log-probabilities of tokens, as completions give them with `logprobs`."""

    tokens: list[Text]
    token_logprobs: list[float | None]
    text_offset: list[int] | None = None
    top_logprobs: list[dict[Text, float] | None] | None = None


class ContentPart(_Part):
    """A part of a message's content."""

    type: Text
    text: Text = ""


class Message(_Part):
    """A message of a chat completion."""

    content: Text | list[ContentPart] | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    refusal: Text | None = None


class Choice(_Part):
    """One of the continuations in an answer."""

    text: Text | None = None
    message: Message | None = None
    finish_reason: Text | None = None
    logprobs: LogProbs | None = None


class Usage(_Part):
    """The numbers of tokens that a server counted."""

    completion_tokens: int | None = None


class Answer(_Part):
    """An answer to one request."""

    choices: list[Choice]
    usage: Usage | None = None

    @property
    def choice(self) -> Choice:
        """The one continuation."""
        return self.choices[0]


class Continuation(_Part):
    """What a model wrote.

    Attributes:
        text: the answer; empty where it was cut or withheld before it began.
        finish_reason: as the server gives it, `refusal`, or `unknown`.
        reasoning: what the model thought, where the server keeps it apart.
    """

    text: Text
    finish_reason: Text
    reasoning: Text = ""


def parse_answer(data: bytes) -> Answer:
    """Return what the body of an answer with status 200 says.

    Raises:
        AnswerError: it is no JSON, an error, or has not exactly one choice of the right shape.
    """
    try:
        content = json.loads(data, parse_constant=_refuse_constant)
    except RecursionError:
        raise AnswerError("its answer is nested too deeply") from None
    except ValueError as error:
        start = " ".join(data[:60].decode("utf-8", "replace").split())
        raise AnswerError(f"its answer is no JSON ({error}): it begins with {start!r}") from None
    if not isinstance(content, dict):
        raise AnswerError(f"its answer is no JSON object, but {type(content).__name__}")
    _refuse_errors(content)
    try:
        answer = Answer.model_validate(content)
    except (ValidationError, OverflowError) as error:
        raise AnswerError(f"its answer has another shape: {_first_problem(error)}") from None
    if len(answer.choices) != 1:
        raise AnswerError(f"its answer has {len(answer.choices)} choices, not one")
    if answer.choice.finish_reason in FAILED:
        raise AnswerError(f"its answer ended with finish_reason={answer.choice.finish_reason!r}")
    return answer


def _refuse_constant(name: str) -> NoReturn:
    raise AnswerError(f"its answer holds {name}, which is no number")


def _refuse_errors(content: dict[str, Any]) -> None:
    """Raise `AnswerError` for an error that came with status 200."""
    error = content.get("error")
    if error is None and content.get("object") == "error":
        error = content
    if error is None and "choices" not in content:
        error = content.get("detail") or content.get("message")
    if error is None:
        return
    named = error.get("message", error) if isinstance(error, dict) else error
    code = error.get("code") if isinstance(error, dict) else None
    number = int(code) if isinstance(code, int) or (isinstance(code, str) and code.isdecimal()) else None
    permanent = number in PERMANENT_CODES and number not in TEMPORARY_CODES
    raise AnswerError(f"an error under status 200: {shorten(named)}", is_temporary=not permanent)


def _first_problem(error: ValidationError | OverflowError) -> str:
    if isinstance(error, OverflowError):
        return str(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def shorten(value: object, length: int = 200) -> str:
    """Return a value as one short line that any terminal can print."""
    text = " ".join(str(value).split())
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:length])


def continuation_of(answer: Answer, is_chat: bool) -> Continuation:
    """Return the text that an answer holds.

    Raises:
        AnswerError: it holds none, and nothing says why.
    """
    choice = answer.choice
    reason = choice.finish_reason or UNKNOWN_REASON
    if not is_chat:
        if choice.text is None and reason not in WITHOUT_TEXT:
            raise AnswerError(f"its answer has no text, and finish_reason={choice.finish_reason!r}")
        return Continuation(text=choice.text or "", finish_reason=reason)
    message = choice.message
    if message is None:
        if reason in WITHOUT_TEXT:
            return Continuation(text="", finish_reason=reason)
        raise AnswerError(f"its answer has no message, and finish_reason={choice.finish_reason!r}")
    reasoning = message.reasoning_content or message.reasoning or ""
    text = message.content
    if isinstance(text, list):
        reasoning += "".join(part.text for part in text if part.type in ("thinking", "reasoning"))
        text = _joined(text)
    if not text and message.refusal:
        return Continuation(text="", finish_reason="refusal", reasoning=reasoning)
    if text is None and not reasoning and reason not in WITHOUT_TEXT:
        raise AnswerError(f"its message has no content, and finish_reason={choice.finish_reason!r}")
    return Continuation(text=text or "", finish_reason=reason, reasoning=reasoning)


def _joined(parts: Sequence[ContentPart]) -> str:
    unknown = next((one.type for one in parts if one.type not in ("text", "thinking", "reasoning")), None)
    if unknown is not None:
        raise AnswerError(f"its message has content of type {shorten(unknown, 40)}, which is no text")
    return "".join(one.text for one in parts if one.type == "text")
