"""What is unusual in generated answers: cut, withheld, only reasoning, in another form than was asked for."""

import re
from collections.abc import Sequence

from ascendspeed_eval.model import GenerateResult

ONLY_REASONING, UNCLOSED, REASONING, EMPTY = "only reasoning", "unclosed reasoning", "reasoning", "empty"
FENCE, REPEATED, OWN_OPERATORS = "code fence", "repeated definition", "own operators"
CUT_MARKS = {
    "length": "reached the length limit",
    "content_filter": "were withheld by a filter",
    "refusal": "were refused",
}
"""Reasons of an end that cut an answer off, and what a report says of them."""
INCOMPLETE_MARKS = CUT_MARKS | {
    ONLY_REASONING: "hold only reasoning",
    UNCLOSED: "never end their reasoning",
    EMPTY: "are empty",
}
"""Marks of samples that a second score leaves out."""
FORM_MARKS = {
    REASONING: "begin with reasoning",
    FENCE: "hold a code fence",
    REPEATED: "repeat the definition that they should complete",
    OWN_OPERATORS: "pass with the help of operators of their own, such as __eq__, as in the benchmark's harness",
}
"""Marks that change no score by themselves, and what a report says of them."""

OPENED = re.compile(r"<(think|thinking|reasoning)>\s*\Z")
"""The end of a prompt that begins the reasoning."""
_OPEN, _CLOSE = re.compile(r"\s*<(think|thinking|reasoning)>"), re.compile(r"</(think|thinking|reasoning)>")


def has_reasoning(text: str) -> bool:
    """Return whether a text holds reasoning in tags, as models write it that were trained to think first."""
    return bool(_OPEN.match(text) or _CLOSE.search(text))


def without_reasoning(text: str, is_open: bool = False) -> str:
    """Return what follows the reasoning; nothing if that never ends.

    Args:
        text: of the model.
        is_open: whether the prompt began the reasoning.
    """
    found = list(_CLOSE.finditer(text))
    if found:
        return text[found[-1].end() :]
    return "" if is_open or _OPEN.match(text) else text


def marks_of(texts: Sequence[GenerateResult], is_open: bool = False) -> list[str]:
    """Return what a reader should know of texts: whether they were cut, withheld, or are only reasoning.

    Args:
        texts: of the model, with their reasoning.
        is_open: whether the prompt began the reasoning.
    """
    marks = []
    for one in texts:
        is_answer = bool(without_reasoning(one.text, is_open).strip())
        is_unclosed = (is_open or bool(_OPEN.match(one.text))) and not _CLOSE.search(one.text)
        reasoned = is_unclosed or bool(one.reasoning.strip()) or has_reasoning(one.text)
        marks += [one.finish_reason] if one.finish_reason in CUT_MARKS else []
        if reasoned:
            marks.append(UNCLOSED if is_unclosed else REASONING if is_answer else ONLY_REASONING)
        marks += [EMPTY] if not one.text.strip() and not reasoned else []
    return list(dict.fromkeys(marks))
