r"""Find and compare answers to mathematical questions.

The rules are those of AGIEval (post_process.py) and of the MATH benchmark (Hendrycks et al., 2021,
math_equivalence.py): spellings of the same value in LaTeX, such as `\frac12`, `\dfrac{1}{2}`, `1/2` and `0.5`, have
one canonical form, and the forms are compared as text.
"""

import re

DROPPED_LATEX = (r"\!", r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$")


def find_answer(text: str) -> str | None:
    r"""Return the answer within a text: the last `\boxed{}`, else the last `$...$`, else what follows the last `=`.

    Without any of these, the last number.
    """
    if r"\boxed" in text:
        return _boxed(text)
    dollars = re.findall(r"\$(.*)\$", text)
    answer: str | None = _after_equals(dollars[-1]) if dollars else None
    if answer:
        return answer
    if "=" in text:
        return _after_equals(text).rstrip(".").split("\\n")[0]
    numbers = re.findall(r"(?:\$)?\d+(?:\.\d+)?(?![\w\d])", text)
    return numbers[-1] if numbers else None


def _after_equals(text: str) -> str:
    return text.rpartition("=")[2].lstrip(" ") if "=" in text else text


def _boxed(text: str) -> str | None:
    start = text.rfind(r"\boxed")
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if text[position] == "}" and depth == 0:
            inside = text[start : position + 1]
            return _after_equals(inside[len(r"\boxed{") : -1]) if inside.startswith(r"\boxed{") else None
    return None


def same_answer(first: str, second: str) -> bool:
    """Compare the canonical forms of two answers; without canonical forms compare the texts."""
    try:
        return canonical_form(first) == canonical_form(second)
    except (IndexError, ValueError):
        return first == second


def canonical_form(text: str) -> str:
    """Return the canonical form of an answer.

    Raises:
        IndexError: incomplete LaTeX.
        ValueError: more than one unit.
    """
    text = text.replace("\n", "").replace(r"\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for command in DROPPED_LATEX[1:]:
        text = text.replace(command, "")
    if r"\text{ " in text:
        text, _ = text.split(r"\text{ ")
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0]) <= 2:
        text = sides[1]
    text = _braces_after_sqrt(text).replace(" ", "")
    text = _braces_after_frac(text)
    if text == "0.5":
        text = r"\frac{1}{2}"
    return _slash_to_frac(text)


def _braces_after_sqrt(text: str) -> str:
    first, *parts = text.split(r"\sqrt")
    return first + "".join(
        r"\sqrt" + (part if part[0] == "{" else "{" + part[0] + "}" + part[1:]) for part in parts
    )


def _braces_after_frac(text: str) -> str:
    first, *parts = text.split(r"\frac")
    out = first
    for part in parts:
        if part[0] == "{":
            out += r"\frac" + part
        elif len(part) < 2:
            return text
        else:
            below = part[1:] if part[1] == "{" else "{" + part[1] + "}" + part[2:]
            out += r"\frac{" + part[0] + "}" + below
    return out


def _slash_to_frac(text: str) -> str:
    found = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    if not found or f"{int(found[1])}/{int(found[2])}" != text:
        return text
    return rf"\frac{{{int(found[1])}}}{{{int(found[2])}}}"
