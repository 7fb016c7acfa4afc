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
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")
"""Roles, in ShareGPT and ms-swift's messages, whose text is a call of a tool."""


class MessagesHandler(HandlerBase):
    """Conversations in the format of OpenAI: `messages` is a list of objects with `role` and `content`.

    Turns of ShareGPT, with `from` and `value`, are read too.
    """

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
        return with_system(record, messages_of(record.get("messages"), "messages"))

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the samples of the conversation, most often one; one whose answers all have weight 0 is skipped."""
        conversation = conversation_of(self.messages(record), variables_in(record))
        if conversation.is_masked:
            return []
        return ChatTemplate.for_conversation(tokenizer, conversation).samples(conversation)


class ShareGPTHandler(MessagesHandler):
    """Conversations in the format of ShareGPT: `conversations` is a list of objects with `from` and `value`.

    Turns with `role` and `content` are read too.
    """

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
        return with_system(record, messages_of(record.get("conversations"), "conversations", are_turns=True))


def messages_of(turns: Any, column: str, are_turns: bool = False) -> list[Message]:
    """Return the turns of a column as messages; a turn has `role` and `content`, or `from` and `value`.

    Args:
        turns: value of the column.
        column: its name, for messages.
        are_turns: whether the roles of all turns, not only of those with `from` or `value`, are those of ShareGPT.

    Raises:
        DataError: the column is not a list of turns, or a role is unknown.
    """
    made = []
    for number, turn in enumerate(list_of_turns(turns, column), 1):
        is_turn = are_turns or turn.get("from") is not None or turn.get("value") is not None
        is_turn |= turn.get("role") in (*CALLS, "tool_response")
        made.append(sharegpt_message(turn, number) if is_turn else turn)
    return made


def sharegpt_message(turn: dict[str, Any], number: int) -> Message:
    """Return a turn of ShareGPT as a message; the text of a `function_call` or `tool_call` becomes tool calls.

    `role` stands for `from`, and `content` for `value`, as some sets have them.

    Raises:
        DataError: the role is unknown, or the turn has a key of both forms.
    """
    of_speaker = "role" if turn.get("from") is None and "role" in turn else "from"
    has_value = turn.get("value") is not None or (of_speaker == "from" and "content" not in turn)
    of_text = "value" if has_value else "content"
    speaker, value = str(turn[of_speaker]), turn.get(of_text)
    others = {name: part for name, part in turn.items() if name not in (of_speaker, of_text) and filled(part)}
    if not others.keys().isdisjoint(("from", "value", "role", "content")):
        raise DataError(f"turn {number} has 'from' and 'value', and 'role' or 'content' too; keep one form")
    role = SHAREGPT_ROLES.get(speaker.lower())
    if role is None and of_speaker == "role":
        role = speaker
    if role is None:
        raise DataError(
            f"turn {number} is from {turn[of_speaker]!r}; the role must be one of {', '.join(SHAREGPT_ROLES)}"
        )
    if speaker.lower() in CALLS:
        if not isinstance(value, str):
            raise DataError(f"turn {number}: {of_text!r} holds {type(value).__name__}, not text")
        try:
            return {"role": role, "content": None, "tool_calls": tool_calls_of_text(value), **others}
        except DataError as error:
            raise DataError(f"turn {number}: {error}") from None
    has_calls = value is None and (others.get("tool_calls") or others.get("function_call"))
    if not isinstance(value, str | list) and not has_calls:
        raise DataError(f"turn {number}: {of_text!r} holds {type(value).__name__}, not text")
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


def list_of_turns(turns: Any, column: str) -> list[dict[str, Any]]:
    """Return the turns in a column, decoded if they are held as JSON text.

    An object of equally long lists, as a `Sequence` of `datasets` holds objects, is a list of objects too.

    Raises:
        DataError: the column is not a list of objects with a role, or a turn of ShareGPT has no text.
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
        where = f"turn {number} of column {column!r}"
        if not isinstance(turn, dict) or not ("role" in turn or "from" in turn):
            raise DataError(f"{where} has no 'role' and 'content', or 'from' and 'value'")
        if "from" in turn and not ("value" in turn or "content" in turn):
            raise DataError(f"{where} has no 'from' and 'value'")
    return turns
