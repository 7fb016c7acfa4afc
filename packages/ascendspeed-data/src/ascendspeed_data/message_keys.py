"""Which keys of its messages a chat template read."""

from ascendspeed_data.conversation import Message
from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import MESSAGE_CONTENT, REASONING, check_unlisted, field_of, filled, message_key
from ascendspeed_data.tracking import TrackedObject, unread_of


def tracked(message: Message) -> TrackedObject:
    """Return a message that notes which keys the template reads, also in its tool calls."""
    made = dict(message)
    if "tool_calls" in made:
        made["tool_calls"] = [
            TrackedObject(
                {**call, "function": TrackedObject(call["function"])} if "function" in call else call
            )
            for call in made["tool_calls"]
        ]
    return TrackedObject(made)


def unread_keys(message: TrackedObject, is_shown_elsewhere: bool = False) -> list[str]:
    """Return the keys without effect of a message that was rendered.

    Args:
        message: that was rendered.
        is_shown_elsewhere: whether its thoughts are learned in another sample.

    Raises:
        DataError: a key that says something was not read.
    """
    unread = unread_of(message)
    role = dict.get(message, "role")
    counted = []
    for name, value in unread.items():
        if name == "role" or not filled(value) or (value is False and field_of(name, "message") is not None):
            continue
        if name in REASONING and any(other in message and other not in unread for other in REASONING):
            continue
        if name in REASONING and is_shown_elsewhere:
            continue
        if name == "content" and any(
            n not in unread for n in ("tool_calls", "function_call") if n in message
        ):
            text = value if isinstance(value, str) else "".join(part["text"] for part in value)
            if not text.strip():
                continue
        if field_of(name, "message") is None:
            check_unlisted(name, value, "message", str(role))
        if field_of(name, "message") is None or (name == "name" and role in ("tool", "function")):
            counted.append(message_key(name))
        else:
            shown = (
                " or ".join(repr(n) for n in REASONING if n in message) if name in REASONING else repr(name)
            )
            raise DataError(
                f"key {shown} (role {role!r}): {MESSAGE_CONTENT.reason}; {MESSAGE_CONTENT.remedy}"
            )
    if "tool_calls" not in unread:
        for number, call in enumerate(dict.get(message, "tool_calls") or (), 1):
            inner = dict.get(call, "function")
            for named in (call, inner) if isinstance(inner, TrackedObject) else (call,):
                for name in ("function", "name", "arguments"):
                    if filled(unread_of(named).get(name)):
                        raise DataError(f"tool_calls[{number}]: key {name!r}: {MESSAGE_CONTENT.reason}")
    return counted
