"""Recognise keys under names that no table lists, by the words in a name and the kind of its value.

`is_masked: true`, `doTrain: 0` and `message_weights: [0, 1]` say what is to be learned. `training_source: "web"` and
`loss_step: 7` do not: texts that are no numbers, and names that end like a measure or an identifier, are descriptions.
Neither is `image_count: 2` a picture, or `system_fingerprint` a system message.
"""

import re
from typing import Any

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_STEM = re.compile(
    r"(?P<lead>is|do|no|not|non|un|use|should|can)?"
    r"(?P<stem>train|finetun|loss|weight|learn|supervis|label|gradient|grad(?![a-z])|backprop|mask|ignor|skip|exclud)"
)
_OTHER_WORDS = frozenset(
    ("trainer", "trainers", "trainee", "labeler", "labelers", "labeller", "labellers", "lossless", "lossy", "learner",
     "learners", "weightless")
)  # fmt: skip
_NEGATIONS = frozenset(("no", "not", "non", "un", "dont", "never", "without"))
_LEFT_OUT = frozenset(("mask", "ignor", "skip", "exclud"))
_DESCRIPTIONS = frozenset(
    ("id", "ids", "idx", "index", "step", "steps", "epoch", "epochs", "date", "time", "timestamp", "seconds", "version",
     "rate", "size", "count", "counts", "name", "names", "url", "path", "file", "hash", "kg", "args", "params",
     "config", "settings", "info", "meta", "metadata")
)  # fmt: skip
_COUNTS = frozenset(("num", "n", "number", "count"))
_SPEAKERS = frozenset(
    ("system", "user", "human", "assistant", "gpt", "tool", "input", "inputs", "output", "outputs", "prompt",
     "completion", "completions", "response", "all", "last", "none", "turn")
)  # fmt: skip


_MEDIA = frozenset(
    ("image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "video", "videos", "audio", "audios",
     "pixel", "pixels")
)  # fmt: skip
_MEASURES = frozenset(
    ("id", "ids", "size", "sizes", "count", "width", "height", "length", "duration", "hash")
)
_SYSTEM = re.compile(r"(my)?sys(tem)?(prompts?|messages?|msgs?|instructions?|texts?)")
_THOUGHTS = frozenset(
    (
        "think",
        "thinking",
        "thought",
        "thoughts",
        "reasoning",
        "cot",
        "chainofthought",
        "chainofthoughts",
        "scratchpad",
    )
)


def snake_case(name: str) -> str:
    """Return a name with its words in lower case and underscores between them: `toolCalls` is `tool_calls`."""
    return "_".join(_words(name))


def names_media(name: str, value: Any) -> bool:
    """Return whether a key with a filled value holds pictures, sound or paths of them."""
    words = _words(name)
    if not words or words[-1] in _MEASURES:
        return False
    return not _MEDIA.isdisjoint(words) and not isinstance(value, bool | int | float)


def names_system(name: str, value: Any) -> bool:
    """Return whether a key with a filled value holds a system message."""
    return _SYSTEM.fullmatch("".join(_words(name))) is not None and not isinstance(value, bool | int | float)


def names_thoughts(name: str, value: Any) -> bool:
    """Return whether a key with a filled value holds what an assistant thinks before it answers."""
    words = _words(name)
    is_said = isinstance(value, str) or (isinstance(value, list) and not all(map(_is_choice, value)))
    found = not _THOUGHTS.isdisjoint((*words, "".join(words)))
    return (
        found and is_said and words[-1] not in _DESCRIPTIONS and words[-1] not in ("effort", "level", "model")
    )


def names_mask(name: str, value: Any) -> bool:
    """Return whether a key with a filled value says what is to be learned."""
    words = _words(name)
    if not words or words[-1] in _DESCRIPTIONS or words[0] in _COUNTS or not _stems(words):
        return False
    return _is_choice(value)


def all_learned(name: str, value: Any) -> bool | None:
    """Return what the value of a mask says of all that it is for: learned, not learned; `None` if it is not clear.

    A bare `mask` is not clear: for some programs its ones are learned, for others they are left out.
    """
    words = _words(name)
    stems = _stems(words)
    values = set(_numbers(value))
    if not stems or len(values) != 1 or not values <= {0, 1}:
        return None
    first = stems[0]
    if len(stems) == 1 and any(word in ("mask", "masks") for word in words):
        return None
    is_one = values == {1}
    return is_one ^ (first in _LEFT_OUT) ^ _is_negated(words)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _stems(words: list[str]) -> list[str]:
    found = (_STEM.match(word) for word in words if word not in _OTHER_WORDS)
    return [match["stem"] for match in found if match is not None]


def _is_negated(words: list[str]) -> bool:
    leads = (match["lead"] for match in map(_STEM.match, words) if match is not None)
    return any(word in _NEGATIONS for word in (*words, *leads) if word)


def _is_choice(value: Any) -> bool:
    """Return whether a value is a number, a truth value or a speaker, or holds such."""
    if isinstance(value, bool | int | float):
        return True
    if isinstance(value, str):
        return _number(value) is not None or value.strip().lower() in _SPEAKERS
    if isinstance(value, list | tuple):
        return bool(value) and all(_is_choice(part) for part in value)
    if isinstance(value, dict):
        return any(
            isinstance(part, bool | int | float | list) and _is_choice(part) for part in value.values()
        )
    return False


def _numbers(value: Any) -> list[float | None]:
    """Return the numbers in a value; `None` stands for anything else in it."""
    if isinstance(value, list | tuple):
        return [number for part in value for number in _numbers(part)]
    if isinstance(value, str):
        return [_number(value)]
    return [value if isinstance(value, bool | int | float) else None]


def _number(text: str) -> float | None:
    """Return the number or truth value in a text, as CSV has it."""
    text = text.strip().lower()
    if text in ("true", "false", "yes", "no"):
        return float(text in ("true", "yes"))
    return float(text) if re.fullmatch(r"-?\d+(\.\d*)?", text) else None
