"""What is unusual in generated answers: cut, withheld, only reasoning, in another form than was asked for."""

import re
from collections.abc import Sequence

from ascendspeed_eval.model import GenerateResult

ONLY_REASONING, REASONING, EMPTY = "only reasoning", "reasoning", "empty"
FENCE, REPEATED, OWN_OPERATORS = "code fence", "repeated definition", "own operators"
CUT_MARKS = {
    "length": "reached the length limit",
    "content_filter": "were withheld by a filter",
    "refusal": "were refused",
}
"""Reasons of an end that cut an answer off, and what a report says of them."""
INCOMPLETE_MARKS = CUT_MARKS | {ONLY_REASONING: "hold only reasoning", EMPTY: "are empty"}
"""Marks of samples that a second score leaves out."""
FORM_MARKS = {
    REASONING: "begin with reasoning",
    FENCE: "hold a code fence",
    REPEATED: "repeat the definition that they should complete",
    OWN_OPERATORS: "pass with the help of operators of their own, such as __eq__, as in the benchmark's harness",
}
"""Marks that change no score by themselves, and what a report says of them."""

_OPEN, _CLOSE = re.compile(r"\s*<(think|thinking|reasoning)>"), re.compile(r"</(think|thinking|reasoning)>")


def has_reasoning(text: str) -> bool:
    """Return whether a text holds reasoning in tags, as models write it that were trained to think first."""
    return bool(_OPEN.match(text) or _CLOSE.search(text))


def without_reasoning(text: str) -> str:
    """Return what follows the reasoning; nothing if that never ends. Templates may have opened it in the prompt."""
    found = list(_CLOSE.finditer(text))
    if found:
        return text[found[-1].end() :]
    return "" if _OPEN.match(text) else text


def marks_of(texts: Sequence[GenerateResult]) -> list[str]:
    """Return what a reader should know of texts: whether they were cut, withheld, or are only reasoning."""
    marks = []
    for one in texts:
        is_answer = bool(without_reasoning(one.text).strip())
        reasoned = bool(one.reasoning.strip()) or has_reasoning(one.text)
        marks += [one.finish_reason] if one.finish_reason in CUT_MARKS else []
        marks += [ONLY_REASONING] if reasoned and not is_answer else [REASONING] if reasoned else []
        marks += [EMPTY] if not one.text.strip() and not reasoned else []
    return list(dict.fromkeys(marks))
