"""Keys of records and messages that can change what a model learns, and what becomes of each.

Other programs write these keys under the spellings below. A key is honoured, or refused by name; it is never dropped.
So is a key that is not listed, but whose name has the words of a listed one (`key_names`). Any other key that nothing
reads is counted, and the manifest names it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ascendspeed_data.errors import DataError
from ascendspeed_data.key_names import (
    all_learned,
    names_mask,
    names_media,
    names_system,
    names_thoughts,
    snake_case,
)

Level = Literal["record", "message"]


@dataclass(frozen=True)
class Field:
    """Keys with one meaning.

    Attributes:
        names: the spellings.
        level: whether records or messages have them.
        use: what becomes of the keys.
        reason: why a value that is not honoured is refused.
        remedy: what a user can do.
    """

    names: tuple[str, ...]
    level: Level
    use: str
    reason: str
    remedy: str


LEARNED = Field(
    ("weight", "loss_weight", "loss_scale", "loss_mask", "loss", "train", "training", "trainable", "train_on_turn",
     "learn"),
    "message",
    "0 or false: the assistant message is context without loss; 1 or true: it is learned",
    "only 0 and 1 (or false and true) are supported, and only an assistant message is learned",
    "give 0 or 1, and 1 only to assistant messages",
)  # fmt: skip
PARTLY_LEARNED = Field(
    ("mask", "masked", "mask_loss", "ignore", "ignored", "ignore_loss", "skip", "no_loss", "no_train", "train_detail",
     "training_detail", "train_on_input", "labels", "weights", "token_weights"),
    "message",
    "refused if filled, unless it says what holds anyway (`masked`: false)",
    "says which part of the conversation is learned, in a way that is not supported",
    "give each message that is not to be learned weight 0, and remove the key",
)  # fmt: skip
MESSAGE_CONTENT = Field(
    ("content", "name", "tool_calls", "tool_call", "function_call", "tools", "functions", "reasoning_content",
     "reasoning", "thinking", "thought", "thoughts", "refusal", "documents", "context", "channel", "recipient",
     "prefix", "condition"),
    "message",
    "given to the chat template; refused if filled and the template does not read it (`name` of a tool is counted)",
    "the chat template does not read it, so it would not be learned",
    "use a chat template that reads it, or remove the key",
)  # fmt: skip
MESSAGE_MEDIA = Field(
    ("image", "images", "image_url", "video", "videos", "audio", "audios"),
    "message",
    "refused if filled",
    "holds media, but the models read text",
    "remove the message's media, or the record",
)
RECORD_WEIGHT = Field(
    ("weight", "weights", "loss_weight", "sample_weight", "example_weight", "loss_scale", "loss_mask", "loss", "train",
     "training", "trainable", "learn", "kto_tag", "label"),
    "record",
    "1 and true have no effect; a text in `label` is counted; any other value is refused",
    "weighs or judges the record, but each record is learned in the same way",
    "remove the records that are not to be learned, then the column",
)  # fmt: skip
RECORD_LABELS = Field(
    ("labels", "input_ids", "attention_mask", "completion_mask", "assistant_mask", "assistant_masks", "prompt_mask",
     "target_mask", "mask", "masked", "mask_history", "train_on_input", "train_on_inputs", "train_on_prompt",
     "roles_to_train", "segments", "token_weights"),
    "record",
    "refused if filled, unless it says what holds anyway (`train_on_inputs`, `mask_history`, `masked`: false)",
    "says which part of the record is learned, in a way that is not supported",
    "give each message that is not to be learned weight 0, and remove the column",
)  # fmt: skip
RECORD_CONTENT = Field(
    ("system", "history", "reasoning_content", "reasoning", "thinking", "thoughts", "tool_calls", "function_call"),
    "record",
    "used where the table of the handler says so; otherwise refused if filled",
    "is part of the conversation, but this handler has no place for it",
    "move it into the columns that the handler reads, or remove the column",
)  # fmt: skip
RECORD_SYSTEM = Field(
    ("system_prompt", "system_message", "sys_prompt"),
    "record",
    "refused if filled",
    "holds a system message under a name that is not read",
    "rename the column to 'system'",
)
TEMPLATE_VARIABLES = Field(
    ("tools", "functions", "documents", "enable_thinking", "reasoning_effort", "builtin_tools", "custom_tools",
     "chat_template_kwargs"),
    "record",
    "variables of the chat template; refused if filled and the template does not read them",
    "the chat template does not read it, so it would not be learned",
    "use a chat template that reads it, or remove the column",
)  # fmt: skip
RECORD_MEDIA = Field(
    ("image", "images", "image_url", "video", "videos", "audio", "audios", "objects"),
    "record",
    "refused if filled",
    "holds media, but the models read text",
    "remove the records with media, or the column",
)

FIELDS = (
    LEARNED,
    PARTLY_LEARNED,
    MESSAGE_CONTENT,
    MESSAGE_MEDIA,
    RECORD_WEIGHT,
    RECORD_LABELS,
    RECORD_CONTENT,
    RECORD_SYSTEM,
    TEMPLATE_VARIABLES,
    RECORD_MEDIA,
)
"""Every key that can change what is learned."""

NEUTRAL_IF_FALSE = ("train_on_input", "train_on_inputs", "train_on_prompt", "mask_history")
"""Columns that say what holds anyway if they are false: every answer is learned, and nothing else."""

MASKS_OF_ALL = (
    "masked",
    "mask_loss",
    "ignore",
    "ignored",
    "ignore_loss",
    "skip",
    "no_loss",
    "no_train",
    "weights",
)
"""Listed masks whose value, if it is one for all, says clearly whether that is learned."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what an assistant thinks before it answers; templates read one of them."""


def filled(value: Any) -> bool:
    """Return whether a value says something: null and empty texts, lists and objects do not."""
    return not (value is None or (isinstance(value, str | list | tuple | dict) and not value))


def field_of(name: str, level: Level) -> Field | None:
    """Return the field of a key, or `None` if the key cannot change what is learned."""
    return next((field for field in FIELDS if field.level == level and name in field.names), None)


def is_learned(message: Mapping[str, Any], role: str) -> bool:
    """Return whether an assistant message is learned, by its keys of `LEARNED`; a message without one is.

    Raises:
        DataError: a value is neither 0 nor 1, two keys contradict each other, or a message of another role is to be
            learned.
    """
    found: dict[str, bool] = {}
    for name in LEARNED.names:
        value = message.get(name)
        if not filled(value):
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(f"key {name!r} is {value!r}; {LEARNED.reason}; {LEARNED.remedy}")
        found[name] = bool(value)
    if len(set(found.values())) > 1:
        raise DataError(f"keys {' and '.join(map(repr, found))} contradict each other; keep one")
    learned = all(found.values())
    if found and learned and role != "assistant":
        raise DataError(
            f"key {next(iter(found))!r} is {message[next(iter(found))]!r} for the role {role!r}; {LEARNED.reason}; "
            f"{LEARNED.remedy}"
        )
    return learned


def check_record(unread: Mapping[str, Any], handler: str, refused: Collection[str] = ()) -> list[str]:
    """Return the filled columns that a handler of samples did not read and that cannot change what is learned.

    Args:
        unread: the columns that were not read.
        handler: name of the handler, for messages.
        refused: further columns that have a meaning for this handler.

    Raises:
        DataError: a filled column can change what is learned.
    """
    counted = []
    for name, value in unread.items():
        field = RECORD_CONTENT if name in refused else field_of(name, "record")
        if not filled(value):
            continue
        if field is None or (name == "label" and isinstance(value, str) and not _is_number(value)):
            check_unlisted(name, value, "record")
            counted.append(name)
        elif field is TEMPLATE_VARIABLES:
            raise DataError(
                f"column {name!r} is for a chat template, but {handler} has none; remove the column"
            )
        elif not ((field is RECORD_WEIGHT and _is_one(value)) or says_nothing_new(name, value, "record")):
            shown = f" is {value!r}; it" if field is RECORD_WEIGHT else ""
            raise DataError(f"column {name!r}{shown} {field.reason} ({handler}); {field.remedy}")
    return counted


def says_nothing_new(name: str, value: Any, level: Level, role: str = "assistant") -> bool:
    """Return whether a mask says what holds anyway: that answers are learned, and messages of others are not."""
    if name in NEUTRAL_IF_FALSE and level == "record":
        return value is False or str(value).lower() in ("0", "false")
    if field_of(name, level) is not None and name not in MASKS_OF_ALL:
        return False
    return all_learned(name, value) is (role == "assistant")


def check_unlisted(name: str, value: Any, level: Level, role: str = "assistant") -> None:
    """Check a key that no table lists.

    Raises:
        DataError: by its name and value it is a mask or a weight that says something else than what holds anyway, or
            media, thoughts, a system message, or a listed key in another spelling.
    """
    what = f"{'key' if level == 'message' else 'column'} {name!r}"
    listed, is_mask = snake_case(name), names_mask(name, value)
    if listed not in (name, "label") and field_of(listed, level) is not None and not is_mask:
        raise DataError(f"{what} reads like {listed!r} in another spelling; rename it, or remove it")
    if names_media(name, value):
        raise DataError(f"{what} {MESSAGE_MEDIA.reason} by its name; remove it, or rename it if it does not")
    if names_system(name, value):
        raise DataError(
            f"{what} holds a system message by its name; give it as a message or in the column 'system'"
        )
    if names_thoughts(name, value):
        raise DataError(
            f"{what} holds thoughts by its name, which nothing reads; rename it to 'reasoning_content' in its message, "
            "or remove it"
        )
    if is_mask and not says_nothing_new(name, value, level, role):
        field = PARTLY_LEARNED if level == "message" else RECORD_LABELS
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        raise DataError(
            f"{what} is {shown}; by its name it {field.reason}; "
            f"{field.remedy}, or rename it if it says something else"
        )


def _is_number(text: str) -> bool:
    """Return whether a text, as CSV has it, is a number or a truth value."""
    return text.strip().lower().replace(".", "", 1).lstrip("-").isdigit() or text.strip().lower() in (
        "true",
        "false",
    )


def _is_one(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("1", "1.0", "true")
    return isinstance(value, bool | int | float) and value == 1


def check_turn(turn: Mapping[str, Any], read: Collection[str], left_out: Collection[str] = ()) -> list[str]:
    """Return the filled keys of a turn besides those in `read`, for a handler without a chat template.

    Args:
        turn: the turn.
        read: keys that the handler reads.
        left_out: keys that its rule leaves out, to be counted.

    Raises:
        DataError: a filled key can change what is learned.
    """
    others = {name: value for name, value in turn.items() if name not in read and filled(value)}
    for name, value in others.items():
        field = field_of(name, "message")
        if name in left_out:
            continue
        if field is None:
            check_unlisted(name, value, "message")
        elif field is not PARTLY_LEARNED or not says_nothing_new(name, value, "message"):
            raise DataError(f"key {name!r} is not supported by this handler: {field.remedy}")
    return list(others)


def message_key(name: str) -> str:
    """Return the name under which a key of a message is counted."""
    return f"message key {name!r}"


def unused_summary(unused: Mapping[str, int]) -> str:
    """Return the columns and keys that nothing read in one line, with the number of records that have them."""
    return "not used: " + ", ".join(f"{name} ({count:,} records)" for name, count in unused.items())
