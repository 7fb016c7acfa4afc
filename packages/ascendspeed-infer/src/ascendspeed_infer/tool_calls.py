"""Find the calls of tools in an answer, as models of several families write them, while it grows or when it is whole.

Read are JSON objects with `name` and `arguments` (or `parameters`): between `<tool_call>` and `</tool_call>`, in a list
after `[TOOL_CALLS]`, or as all that is said, alone or in a list. What cannot be read as a call stays text.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from ascendspeed_infer.thinking import ThoughtSplitter

CALL_MARKS = ("<tool_call>", "</tool_call>")
"""Around each call, in the templates of Hermes and Qwen."""
_LIST_MARK = "[TOOL_CALLS]"
"""Before the list of calls, in the templates of Mistral; where it is control, the list stands alone."""
_WHOLE = (_LIST_MARK, '{"name"', '[{"name"')
"""How an answer begins that is nothing but calls, without white space."""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool.

    Attributes:
        name: of the tool.
        arguments: by name.
    """

    name: str
    arguments: dict[str, Any]


class CallSplitter:
    """Splits what an answer says, without its thoughts, into texts and calls, piece by piece.

    An answer that begins as one that is nothing but calls is held back until its end.
    """

    def __init__(self) -> None:
        self._blocks = ThoughtSplitter(marks=CALL_MARKS)
        self._block = ""
        self._held: str | None = ""
        """The whole text, as long as it may be nothing but calls."""

    def feed(self, text: str) -> list[str | ToolCall]:
        """Return what is certain after a further piece of the text."""
        if self._held is not None:
            text, self._held = self._held + text, None
            if _may_be_calls(text):
                self._held = text
                return []
        return self._read(self._blocks.feed(text))

    def end(self) -> list[str | ToolCall]:
        """Return what was held back; a call that was cut off is text."""
        held, self._held = self._held or "", None
        calls = _calls_alone(held)
        if calls is not None:
            return [*calls]
        found = self._read([*self._blocks.feed(held), *self._blocks.end()])
        cut, self._block = self._block, ""
        return [*found, cut] if cut else found

    def _read(self, pieces: list[tuple[str, bool]]) -> list[str | ToolCall]:
        opened, closed = CALL_MARKS
        found: list[str | ToolCall] = []
        for piece, is_call in pieces:
            if not is_call:
                found.append(piece)
                continue
            self._block += piece
            if self._block.endswith(closed):
                value = _json(self._block.removeprefix(opened).removesuffix(closed))
                found.append(_call(value, is_marked=True) or self._block)
                self._block = ""
        return found


@dataclass(frozen=True)
class ToolCalls:
    """An answer that calls tools.

    Attributes:
        text: the answer without its calls.
        calls: each in OpenAI's form, with the arguments as an object.
    """

    text: str
    calls: list[dict[str, Any]]

    def shown(self) -> str:
        """Return the calls as lines of JSON."""
        return "".join(json.dumps(one["function"], ensure_ascii=False) + "\n" for one in self.calls)


def find_tool_calls(answer: str, num_before: int = 0, thinks: bool = False) -> ToolCalls | None:
    """Return the calls of a whole answer, none of those in its thoughts; `None` if it makes none.

    Args:
        answer: of a model.
        num_before: calls that the conversation already has, so that each gets an id of its own.
        thinks: whether the prompt opened the thoughts.
    """
    thoughts, calls = ThoughtSplitter(thinks), CallSplitter()
    pieces: list[str | ToolCall] = []
    for piece, is_thought in [*thoughts.feed(answer), *thoughts.end()]:
        pieces += [piece] if is_thought else calls.feed(piece)
    pieces += calls.end()
    found = [one for one in pieces if isinstance(one, ToolCall)]
    if not found:
        return None
    # Nine letters and digits are the id that Mistral's templates take.
    made = [
        {
            "id": f"call{num_before + number:05d}",
            "type": "function",
            "function": {"name": one.name, "arguments": one.arguments},
        }
        for number, one in enumerate(found)
    ]
    text = "".join(one for one in pieces if isinstance(one, str))
    return ToolCalls(text.strip(), made)


def _may_be_calls(text: str) -> bool:
    begun = re.sub(r"\s", "", text[:100])
    return any(one.startswith(begun) or begun.startswith(one) for one in _WHOLE)


def _calls_alone(text: str) -> list[ToolCall] | None:
    """Return the calls of an answer that is nothing but calls; `None` if it is anything else."""
    value = _json(text.strip().removeprefix(_LIST_MARK))
    calls = [_call(one) for one in (value if isinstance(value, list) else [value])]
    known = [one for one in calls if one is not None]
    return known if known and len(known) == len(calls) else None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, is_marked: bool = False) -> ToolCall | None:
    """Return a call; only a marked one may leave its arguments out, which other objects with a name lack too."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {} if is_marked else None))
    if isinstance(arguments, str):
        arguments = _json(arguments)
    return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None
