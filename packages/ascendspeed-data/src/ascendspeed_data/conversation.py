"""Conversations as chat templates expect them: JSON that records hold as text is decoded, and masks are read.

Every conversation goes through `conversation_of`: training data, preference data, and prompts of a chat.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import (
    LEARNED,
    MESSAGE_MEDIA,
    PARTLY_LEARNED,
    REASONING,
    TEMPLATE_VARIABLES,
    field_of,
    filled,
    is_learned,
    says_nothing_new,
)
from ascendspeed_data.key_names import names_mask

Message = dict[str, Any]

RESERVED_VARIABLES = (
    "messages",
    "tools",
    "add_generation_prompt",
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
)
"""Variables that a chat template gets anyway; `chat_template_kwargs` cannot set them."""


TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that hold text, in the chat completions and the responses of OpenAI's API."""


class CallArguments(dict[str, Any]):
    """The arguments of a tool call: an object that prints as JSON text, for templates that add it to a text.

    Args:
        content: the object.
        text: its JSON text, as it stood in the record; made from the object if not given.
    """

    __slots__ = ("_text",)

    def __init__(self, content: dict[str, Any], text: str | None = None) -> None:
        super().__init__(content)
        self._text = json.dumps(content, ensure_ascii=False) if text is None else text

    def __str__(self) -> str:
        return self._text

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return format(self._text, spec)

    def __add__(self, other: object) -> str:
        return self._text + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> str:
        return other + self._text if isinstance(other, str) else NotImplemented


@dataclass(frozen=True)
class Conversation:
    """A conversation for a chat template.

    Attributes:
        messages: as `conversation_of` returns them; `content` is text, a list of text parts, or null beside tool calls.
        learned: for each message, whether the loss covers it if it is the assistant's.
        variables: further variables of the template, such as `tools`.
        unused: keys that have no effect, to be counted.
    """

    messages: list[Message]
    learned: list[bool]
    variables: dict[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    @property
    def is_masked(self) -> bool:
        """Whether there are assistant messages, but none to learn."""
        flags = [
            learned
            for message, learned in zip(self.messages, self.learned, strict=True)
            if message["role"] == "assistant"
        ]
        return bool(flags) and not any(flags)


def conversation_of(
    messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None, num_context: int = 0
) -> Conversation:
    """Return messages as a chat template expects them.

    Args:
        messages: with `role`, `content` and further keys.
        variables: columns of the record that are variables of the template.
        num_context: messages at the beginning that are context without loss, whatever their keys say.

    Raises:
        DataError: a message cannot be learned as it stands; the text has its number.
    """
    made: list[Message] = []
    learned: list[bool] = []
    unused: dict[str, None] = {}
    for number, message in enumerate(messages, 1):
        try:
            role = message.get("role")
            if not isinstance(role, str):
                raise DataError(f"key 'role' holds {type(role).__name__}, not text")
            learned.append(is_learned(message, role) and number > num_context)
            made.append(_message(message, unused))
        except DataError as error:
            raise DataError(f"message {number}: {error}") from None
    return Conversation(made, learned, _variables(variables or {}), tuple(unused))


def _message(message: Mapping[str, Any], unused: dict[str, None]) -> Message:
    for name, value in message.items():
        known = field_of(name, "message")
        if known is not None and known in (PARTLY_LEARNED, MESSAGE_MEDIA) and filled(value):
            if known is PARTLY_LEARNED and says_nothing_new(name, value, "message", message["role"]):
                continue
            raise DataError(f"key {name!r} {known.reason}; {known.remedy}")
    masks = (*LEARNED.names, *PARTLY_LEARNED.names)
    kept: Message = {
        name: value
        for name, value in message.items()
        if name == "content" or (name not in masks and (filled(value) or value == ""))
    }
    for name in ("tool_calls", "function_call"):
        if name in kept and (not filled(kept[name]) or kept[name] is False):
            del kept[name]
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(kept["tool_calls"])
    if "function_call" in kept:
        kept["function_call"] = _call(
            json_value(kept["function_call"], "key 'function_call'"), "function_call"
        )
    kept["content"] = _content(message, kept, unused)
    thoughts = {kept[name] for name in REASONING if isinstance(kept.get(name), str)}
    if len(thoughts) > 1:
        raise DataError(f"keys {', '.join(name for name in REASONING if name in kept)} differ; keep one")
    for text in thoughts:
        # The names that transformers adds; templates read one of them.
        kept = {"thinking": text, **kept, "reasoning_content": text}
    return kept


def _content(message: Mapping[str, Any], kept: Message, unused: dict[str, None]) -> Any:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        return [_part(part, number, unused) for number, part in enumerate(content, 1)]
    if filled(content):
        raise DataError(f"key 'content' holds {type(content).__name__}, not text or a list of text parts")
    has_calls = kept.get("tool_calls") or kept.get("function_call")
    if isinstance(content, list) and not has_calls:
        return ""
    if not has_calls:
        there = ", ".join(map(str, message)) or "no keys"
        raise DataError(f"there is no text 'content'; the message has {there}")
    return None


def _part(part: Any, number: int, unused: dict[str, None]) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise DataError(
            f"key 'content' is a list, whose part {number} holds {type(part).__name__}, not a text part"
        )
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        raise DataError(
            f"key 'content' is a list, whose part {number} has the type {kind!r}; only parts of the types "
            f"{', '.join(TEXT_PARTS)} are supported"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise DataError(f"key 'content' is a list, whose part {number} has no text 'text'")
    for name, value in part.items():
        if name in ("type", "text") or not filled(value):
            continue
        known = field_of(name, "message")
        if known is not None or names_mask(name, value):
            raise DataError(
                f"key 'content' is a list, whose part {number} has {name!r}; give it to the whole message"
            )
        unused[f"content part key {name!r}"] = None
    return {"type": "text", "text": text}


def json_value(value: Any, what: str) -> Any:
    """Return the value of a JSON text; any other value as it is.

    Raises:
        DataError: the text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise DataError(f"{what} holds the text {_short(value)}, which is not JSON") from None


def json_list(value: Any, what: str) -> list[Any]:
    """Return a list, decoded if it is held as JSON text.

    Raises:
        DataError: the value is not a list.
    """
    decoded = json_value(value, what)
    if not isinstance(decoded, list):
        raise DataError(f"{what} holds {type(decoded).__name__}, not a list")
    return decoded


def tools_of(value: Any) -> list[dict[str, Any]]:
    """Return the tools of a record, decoded where the list, a tool or its parameters are held as JSON text.

    Raises:
        DataError: the value is not a list of objects.
    """
    tools = []
    for number, tool in enumerate(json_list(value, "column 'tools'"), 1):
        what = f"tool {number} of column 'tools'"
        tool = json_value(tool, what)
        if not isinstance(tool, dict):
            raise DataError(f"{what} holds {type(tool).__name__}, not an object")
        tools.append(_decoded_tool(tool, what))
    return tools


def _decoded_tool(tool: dict[str, Any], what: str) -> dict[str, Any]:
    tool = dict(tool)
    for key in ("function", "parameters"):
        if isinstance(tool.get(key), str) and filled(tool[key]):
            tool[key] = json_value(tool[key], f"{key!r} of {what}")
            if not isinstance(tool[key], dict):
                raise DataError(f"{key!r} of {what} holds {type(tool[key]).__name__}, not an object")
    if isinstance(tool.get("function"), dict):
        tool["function"] = _decoded_tool(tool["function"], what)
    return tool


def tool_calls_of_text(text: str) -> list[dict[str, Any]]:
    """Return the tool calls in the text of a turn `function_call`: one object or a list, each with a name.

    Raises:
        DataError: the text is something else.
    """
    calls = json_value(text, "the function call")
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise DataError(
                f'the function call {_short(text)} is not JSON of the form {{"name": ..., "arguments": {{...}}}}'
            )
    return [{"type": "function", "function": call} for call in calls]


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    made = []
    for number, call in enumerate(json_list(value, "key 'tool_calls'"), 1):
        what = f"tool_calls[{number}]"
        call = json_value(call, what)
        if not isinstance(call, dict):
            raise DataError(f"{what} holds {type(call).__name__}, not an object")
        if "function" in call:
            _check_call_keys(call, what)
            function = json_value(call["function"], f"{what}.function")
            made.append({**call, "function": _call(function, f"{what}.function")})
        else:
            made.append(_call(call, what))
    return made


def _call(call: Any, what: str) -> dict[str, Any]:
    """Return a call whose arguments are an object; without arguments, or with an empty text, they are empty."""
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise DataError(f"{what} has no text 'name'")
    _check_call_keys(call, what)
    arguments = call.get("arguments")
    text = arguments if isinstance(arguments, str) and arguments.strip() else None
    decoded = {} if arguments is None or arguments == "" else json_value(arguments, f"{what}.arguments")
    if not isinstance(decoded, dict):
        raise DataError(f"{what}.arguments holds {type(decoded).__name__}, not a JSON object")
    return {**call, "arguments": CallArguments(decoded, text)}


def _check_call_keys(call: Mapping[str, Any], what: str) -> None:
    for name, value in call.items():
        if filled(value) and (name in (*LEARNED.names, *PARTLY_LEARNED.names) or names_mask(name, value)):
            raise DataError(f"{what} has the key {name!r}; give it to the whole message")


def _variables(columns: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in columns.items():
        if not filled(value):
            continue
        if name == "tools":
            value = tools_of(value)
        elif name in ("functions", "documents", "builtin_tools", "custom_tools"):
            value = json_list(value, f"column {name!r}")
        elif name == "enable_thinking":
            value = json_value(value.lower() if isinstance(value, str) else value, f"column {name!r}")
            if not isinstance(value, bool):
                raise DataError(f"column {name!r} holds {value!r}, not true or false")
        elif name == "chat_template_kwargs":
            value = json_value(value, f"column {name!r}")
            if not isinstance(value, dict):
                raise DataError(f"column {name!r} holds {type(value).__name__}, not an object")
            made.update(_further_variables(value))
            continue
        if filled(value):
            made[name] = value
    return made


def _further_variables(value: dict[str, Any]) -> dict[str, Any]:
    for name in value:
        if name in RESERVED_VARIABLES:
            raise DataError(
                f"column 'chat_template_kwargs' sets {name!r}, which the template gets anyway; remove it"
            )
    return {name: part for name, part in value.items() if part is not None}


def variables_in(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a record that are variables of a chat template."""
    return {name: record.get(name) for name in TEMPLATE_VARIABLES.names}


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
