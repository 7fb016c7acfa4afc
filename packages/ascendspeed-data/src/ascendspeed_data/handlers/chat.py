"""Handlers for conversations in the tokenizer's chat template, with loss on every assistant message."""

from collections.abc import Sequence
from typing import Any

from ascendspeed_data.chat_template import ChatTemplate
from ascendspeed_data.conversation import (
    Message,
    conversation_of,
    json_value,
    tool_calls_of_text,
    variables_in,
)
from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import TEMPLATE_VARIABLES, filled
from ascendspeed_data.handlers.base import HandlerBase
from ascendspeed_data.sample import Record, Sample
from ascendspeed_data.tokenizer import Tokenizer

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}


class MessagesHandler(HandlerBase):
    """Conversations in the format of OpenAI: `messages` is a list of objects with `role` and `content`."""

    name = "MessagesHandler"
    columns: Sequence[str] = ("messages",)
    optional_columns: Sequence[str] = ("system", *TEMPLATE_VARIABLES.names)
    summary = "OpenAI messages in the tokenizer's chat template, with loss on every assistant message"
    template = "the tokenizer's chat template"
    example: Record = {  # noqa: RUF012
        "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    }

    def messages(self, record: Record) -> list[Message]:
        """Return the messages of a record, the system message first.

        Raises:
            DataError: the column is not a list of messages, or there are two system messages.
        """
        return with_system(record, list_of_turns(record.get("messages"), "messages", ("role",)))

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the conversation as one sample; a conversation whose answers all have weight 0 is skipped."""
        conversation = conversation_of(self.messages(record), variables_in(record))
        if conversation.is_masked:
            return []
        return [ChatTemplate.from_tokenizer(tokenizer).sample(conversation)]


class ShareGPTHandler(MessagesHandler):
    """Conversations in the format of ShareGPT: `conversations` is a list of objects with `from` and `value`."""

    name = "ShareGPTHandler"
    columns = ("conversations",)
    summary = "ShareGPT conversations in the tokenizer's chat template, with loss on every assistant message"
    example: Record = {  # noqa: RUF012
        "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]
    }

    def messages(self, record: Record) -> list[Message]:
        """Return the turns as messages with the roles of chat templates, the system message first.

        Raises:
            DataError: the column is not a list of turns, a role is unknown, or there are two system messages.
        """
        turns = list_of_turns(record.get("conversations"), "conversations", ("from", "value"))
        return with_system(record, [sharegpt_message(turn, number) for number, turn in enumerate(turns, 1)])


def sharegpt_message(turn: dict[str, Any], number: int) -> Message:
    """Return a turn of ShareGPT as a message; the text of a `function_call` becomes tool calls.

    Raises:
        DataError: the role is unknown, or the turn has a key of both forms.
    """
    speaker, value = str(turn["from"]), turn["value"]
    role = SHAREGPT_ROLES.get(speaker.lower())
    if role is None:
        raise DataError(
            f"turn {number} is from {turn['from']!r}; the role must be one of {', '.join(SHAREGPT_ROLES)}"
        )
    others = {name: part for name, part in turn.items() if name not in ("from", "value") and filled(part)}
    if "role" in others or "content" in others:
        raise DataError(f"turn {number} has 'from' and 'value', and 'role' or 'content' too; keep one form")
    if speaker.lower() == "function_call":
        if not isinstance(value, str):
            raise DataError(f"turn {number}: 'value' holds {type(value).__name__}, not text")
        try:
            return {"role": role, "content": None, "tool_calls": tool_calls_of_text(value), **others}
        except DataError as error:
            raise DataError(f"turn {number}: {error}") from None
    if not isinstance(value, str | list) and not (value is None and others.get("tool_calls")):
        raise DataError(f"turn {number}: 'value' holds {type(value).__name__}, not text")
    return {"role": role, "content": value, **others}


def with_system(record: Record, messages: list[Message]) -> list[Message]:
    """Return messages, after a system message from the column `system` if it is filled.

    Raises:
        DataError: the column does not hold text, or the messages have a system message too.
    """
    system = record.get("system")
    if not filled(system):
        return messages
    if not isinstance(system, str):
        raise DataError(f"column 'system' holds {type(system).__name__}, not text")
    if any(message.get("role") == "system" for message in messages):
        raise DataError("column 'system' is filled, and the conversation has a system message too; keep one")
    return [{"role": "system", "content": system}, *messages]


def list_of_turns(turns: Any, column: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the turns in a column, decoded if they are held as JSON text.

    An object of equally long lists, as a `Sequence` of `datasets` holds objects, is a list of objects too.

    Raises:
        DataError: the column is not a list of objects with these keys.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = json_value(turns, f"column {column!r}")
    if isinstance(turns, dict) and turns and all(isinstance(values, list) for values in turns.values()):
        if len({len(values) for values in turns.values()}) > 1:
            raise DataError(
                f"column {column!r} is an object of lists of different lengths, not a list of turns"
            )
        turns = [
            {key: value for key, value in zip(turns, row, strict=True) if value is not None}
            for row in zip(*turns.values(), strict=True)
        ]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"column {column!r} is not a list of turns, or is empty")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or any(key not in turn for key in keys):
            raise DataError(f"turn {number} of column {column!r} has no {' and '.join(map(repr, keys))}")
    return turns
