"""Handlers for conversations in the tokenizer's chat template, with loss on every assistant message."""

from collections.abc import Sequence
from typing import Any

from ascendspeed_data.chat_template import ChatTemplate, Message
from ascendspeed_data.errors import DataError
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
    optional_columns: Sequence[str] = ("tools",)
    summary = "OpenAI messages in the tokenizer's chat template, with loss on every assistant message"
    template = "the tokenizer's chat template"
    example: Record = {  # noqa: RUF012
        "messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    }

    def messages(self, record: Record) -> list[Message]:
        """Return the messages of a record for the chat template."""
        messages = _list_of_objects(record, "messages", ("role",))
        for number, message in enumerate(messages, 1):
            if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
                raise DataError(f"message {number} has no text 'content'")
        # Parquet and Arrow store every key in every row, missing ones as null.
        return [{key: value for key, value in message.items() if value is not None} for message in messages]

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the conversation as one sample."""
        messages = self.messages(record)
        return [ChatTemplate.from_tokenizer(tokenizer).sample(messages, record.get("tools"))]


class ShareGPTHandler(MessagesHandler):
    """Conversations in the format of ShareGPT: `conversations` is a list of objects with `from` and `value`."""

    name = "ShareGPTHandler"
    columns = ("conversations",)
    optional_columns = ("system", "tools")
    summary = "ShareGPT conversations in the tokenizer's chat template, with loss on every assistant message"
    example: Record = {  # noqa: RUF012
        "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]
    }

    def messages(self, record: Record) -> list[Message]:
        """Return the turns as messages, with the roles of chat templates."""
        messages: list[Message] = []
        if record.get("system"):
            messages.append({"role": "system", "content": record["system"]})
        for number, turn in enumerate(_list_of_objects(record, "conversations", ("from", "value")), 1):
            role = SHAREGPT_ROLES.get(str(turn["from"]).lower())
            if role is None:
                raise DataError(
                    f"turn {number} is from {turn['from']!r}; the role must be one of {', '.join(SHAREGPT_ROLES)}"
                )
            if not isinstance(turn["value"], str):
                raise DataError(f"turn {number}: 'value' holds {type(turn['value']).__name__}, not text")
            messages.append({"role": role, "content": turn["value"]})
        return messages


def _list_of_objects(record: Record, column: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    turns = record.get(column)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"column {column!r} is not a list of turns, or is empty")
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or any(key not in turn for key in keys):
            raise DataError(f"turn {number} of column {column!r} has no {' and '.join(map(repr, keys))}")
    return turns
