"""Find the calls of tools in an answer, as models of several families write them, while it grows or when it is whole.

Between `<tool_call>` and `</tool_call>` stands a JSON object with `name` and `arguments` (or `parameters`), as Hermes
and Qwen write it; or `<function=NAME>` with `<parameter=KEY>`, as Qwen3-Coder, Qwen3.5 and Nemotron do; or a name with
`<arg_key>` and `<arg_value>`, as GLM-4.5 does. Such objects are also read after `[TOOL_CALLS]`, where newer models of
Mistral write `NAME[ARGS]{...}`, or as all that is said, as Llama 3.1 writes them: alone, in a list, or with `;` between
them. What cannot be read as a call stays text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed_infer.thinking import ThoughtSplitter, begun

CALL_MARKS = ("<tool_call>", "</tool_call>")
"""Around each call, in the templates of Hermes and Qwen."""
LIST_MARK, CALL_ID_MARK, ARGUMENTS_MARK = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
"""Before calls, before the id of one and before its arguments, in the templates of Mistral; where the first is control
and not shown, the list stands alone.
"""
_WHOLE = ('{"name"', '[{"name"', '{"type":"function","name"')
"""How an answer begins that is nothing but calls, without white space."""
_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>\s*(.*?)\s*</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]+)\s*((?:<arg_key>.*)?)", re.DOTALL)
_ARGUMENT = re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)
_BY_NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)")
_BETWEEN = re.compile(r"(?:\s|[;,]|\[TOOL_CALLS\])*")
_DECODER = json.JSONDecoder()
_PYTHON = {"True": True, "False": False, "None": None}
"""What templates print that write values as Python does."""


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

    An answer that begins as one that is nothing but calls is held back until its end, and so is what follows
    `[TOOL_CALLS]`.

    Args:
        tools: as they were declared; where values are written as text, they say which of them are texts.
    """

    def __init__(self, tools: Sequence[Any] | None = None) -> None:
        self._types = _types_of(tools or ())
        self._blocks = ThoughtSplitter(marks=CALL_MARKS)
        self._block = ""
        self._held: str | None = ""
        """The whole text, as long as it may be nothing but calls, or the text from the mark of calls on."""
        self._tail = ""
        """The end of the text, as far as it may begin that mark."""

    def feed(self, text: str) -> list[str | ToolCall]:
        """Return what is certain after a further piece of the text."""
        if self._held is not None:
            text, self._held = self._held + text, None
            if _may_be_calls(text):
                self._held = text
                return []
        before, mark, after = (self._tail + text).partition(LIST_MARK)
        self._tail = ""
        if mark:
            self._held = mark + after
        else:
            kept = len(before) - begun(before, LIST_MARK)
            before, self._tail = before[:kept], before[kept:]
        return self._read(self._blocks.feed(before))

    def end(self) -> list[str | ToolCall]:
        """Return what was held back; a call that was cut off is text."""
        held, self._held = self._tail + (self._held or ""), None
        calls = _calls_alone(held)
        if calls is not None:
            return [*self._read(self._blocks.end()), *calls]
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
                inner = self._block.removeprefix(opened).removesuffix(closed)
                found.append(_marked_call(inner, self._types) or self._block)
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


def find_tool_calls(
    answer: str, num_before: int = 0, thinks: bool = False, tools: Sequence[Any] | None = None
) -> ToolCalls | None:
    """Return the calls of a whole answer, none of those in its thoughts; `None` if it makes none.

    Args:
        answer: of a model.
        num_before: calls that the conversation already has, so that each gets an id of its own.
        thinks: whether the prompt opened the thoughts.
        tools: as they were declared.
    """
    thoughts, calls = ThoughtSplitter(thinks), CallSplitter(tools)
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
    is_marked = text.lstrip().startswith(LIST_MARK)
    rest, found = text.strip(), list[ToolCall | None]()
    position = _end_of(_BETWEEN, rest, 0)
    while position < len(rest):
        named = _BY_NAME.match(rest, position) if is_marked else None
        try:
            value, position = _DECODER.raw_decode(rest, named.end() if named else position)
        except (ValueError, RecursionError):
            return None
        if named:
            found.append(ToolCall(named[1], value))
        else:
            found += [_call(one) for one in (value if isinstance(value, list) else [value])]
        position = _end_of(_BETWEEN, rest, position)
    known = [one for one in found if one is not None]
    return known if known and len(known) == len(found) else None


def _end_of(pattern: re.Pattern[str], text: str, start: int) -> int:
    found = pattern.match(text, start)
    return start if found is None else found.end()


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


def _marked_call(text: str, types: "_Types") -> ToolCall | None:
    """Return the call between marks, in whichever form it is written."""
    if function := _FUNCTION.fullmatch(text):
        return _call_of_pairs(function[1].strip(), function[2], _PARAMETER, types)
    named = _NAMED.fullmatch(text)
    if named and (named[2] or named[1] in types):
        return _call_of_pairs(named[1], named[2], _ARGUMENT, types)
    return _call(_json(text), is_marked=True)


def _call_of_pairs(name: str, text: str, pair: re.Pattern[str], types: "_Types") -> ToolCall | None:
    arguments: dict[str, Any] = {}
    end = 0
    while end < len(text):
        found = pair.match(text, end)
        if found is None:
            return None
        key, end = found[1].strip(), found.end()
        arguments[key] = _value(found[2], types.get(name, {}).get(key))
    return ToolCall(name, arguments)


_Types = Mapping[str, Mapping[str, Any]]
"""The schema's types of a tool's parameters, by the names of both."""


def _value(text: str, kind: Any) -> Any:
    """Return a value that is written as text; it is one unless the tool declares another type."""
    if kind is None or kind == "string" or (isinstance(kind, list) and "string" in kind):
        return text
    bare = text.strip()
    if bare in _PYTHON:
        return _PYTHON[bare]
    value = _json(bare)
    return text if value is None and bare != "null" else value


def _types_of(tools: Sequence[Any]) -> _Types:
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else {}
        parameters = function.get("parameters") if isinstance(function, Mapping) else None
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(properties, Mapping):
            found[str(function.get("name"))] = {
                str(key): one.get("type") for key, one in properties.items() if isinstance(one, Mapping)
            }
    return found
