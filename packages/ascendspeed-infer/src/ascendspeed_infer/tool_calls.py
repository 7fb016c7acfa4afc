"""Find the calls of tools in an answer, as models of several families write them."""

import json
import re
from dataclasses import dataclass
from typing import Any

from ascendspeed_infer.thinking import OPEN

_BLOCK = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
"""Qwen's and Hermes's form: an object in each block."""
_LIST_MARK = "[TOOL_CALLS]"
"""Mistral's form: a list after the mark, or alone where the mark is control."""
_THOUGHTS = re.compile(r"\A.*</think>\s*", re.DOTALL)


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


def find_tool_calls(answer: str, num_before: int = 0) -> ToolCalls | None:
    """Return the calls of an answer; `None` if it makes none, or one cannot be read.

    Read are JSON objects with `name` and `arguments` (or `parameters`): in `<tool_call>` blocks, in a list after
    `[TOOL_CALLS]`, or as the whole answer after its thoughts, alone or in a list.

    Args:
        answer: of a model.
        num_before: calls that the conversation already has, so that each gets an id of its own.
    """
    closed = _THOUGHTS.match(answer)
    if closed is None and answer.lstrip().startswith(OPEN):
        return None
    start = closed.end() if closed else 0
    thoughts, rest = answer[:start], answer[start:]
    if blocks := _BLOCK.findall(rest):
        text, objects = (thoughts + _BLOCK.sub("", rest)).strip(), [_json(one) for one in blocks]
    else:
        text, objects = thoughts.strip(), _objects(rest.strip().removeprefix(_LIST_MARK))
    calls = [_call(one, num_before + number) for number, one in enumerate(objects)]
    known = [one for one in calls if one is not None]
    return ToolCalls(text, known) if known and len(known) == len(calls) else None


def _objects(text: str) -> list[Any]:
    value = _json(text.strip())
    return value if isinstance(value, list) else [value]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, number: int) -> dict[str, Any] | None:
    """Return a call in OpenAI's form; nine letters and digits are the id that Mistral's templates take."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(arguments, dict):
        return None
    function = {"name": value["name"], "arguments": arguments}
    return {"id": f"call{number:05d}", "type": "function", "function": function}
