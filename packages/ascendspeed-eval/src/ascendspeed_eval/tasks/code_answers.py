"""Find the program in an answer, in the forms in which models write one: a body, a whole function, fences, prose.

An answer that only goes on with the prompt is taken as it comes. Its first line may lack spaces, because tokenizers
drop some at the start of a text; they never decide.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import dedent, indent

from ascendspeed_eval.tasks.answer_marks import FENCE, REPEATED, without_reasoning

_FENCE = re.compile(r"\s*(```+|~~~+)\s*([^`]*)")
_DEFAULT_INDENT = "    "


@dataclass(frozen=True)
class CodeAnswer:
    """The program that an answer makes together with its prompt.

    Attributes:
        code: the program; without tests.
        is_block: whether the answer's code stood in a fence, so that nothing in it is prose.
    """

    code: str
    is_block: bool


def code_marks(text: str, entry_point: str) -> list[str]:
    """Return what is unusual in the form of an answer that should complete a function."""
    answer = without_reasoning(text)
    marks = [FENCE] if any(map(_FENCE.fullmatch, answer.split("\n"))) else []
    code = fenced_code(answer, entry_point)
    return [*marks, *([REPEATED] if defines(code if code is not None else answer, entry_point) else [])]


def read_code(prompt: str, text: str, entry_point: str) -> CodeAnswer:
    """Return the program of an answer.

    Args:
        prompt: ends inside the function that is wanted.
        text: the answer.
        entry_point: name of that function.
    """
    answer = without_reasoning(text)
    block = fenced_code(answer, entry_point)
    code = answer if block is None else block
    if defines(code, entry_point):
        before = re.split(rf"^def\s+{re.escape(entry_point)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]
        return CodeAnswer(before + "\n" + _from_first_definition(code), block is not None)
    if block is not None:
        body = indent(dedent(block), _indent_of(prompt))
    else:
        body = _with_first_indent(code, _indent_of(prompt))
    return CodeAnswer(prompt + ("" if prompt.endswith("\n") else "\n") + body, False)


def defines(code: str, entry_point: str) -> bool:
    """Return whether code defines a function at its top level, or begins with the definition after some spaces."""
    name = rf"(?:async\s+)?def\s+{re.escape(entry_point)}\s*\("
    return bool(re.match(rf"\s*{name}", code) or re.search(rf"^{name}", code, re.MULTILINE))


def fenced_code(answer: str, entry_point: str) -> str | None:
    """Return the first fenced block that defines the function, else the first block; `None` without a fence.

    A fence without a language that opens nothing, as a text that begins inside a block has it, closes what is before.
    """
    lines = answer.split("\n")
    fences = [number for number, line in enumerate(lines) if _FENCE.fullmatch(line)]
    if not fences:
        return None
    first = _FENCE.fullmatch(lines[fences[0]])
    before = lines[: fences[0]]
    if (
        first is not None
        and not first[2].strip()
        and len(fences) % 2
        and any(line.strip() for line in before)
    ):
        return "\n".join(before) if defines("\n".join(before), entry_point) else None
    blocks = _blocks(lines, fences)
    return next((one for one in blocks if defines(one, entry_point)), blocks[0])


def _blocks(lines: Sequence[str], fences: Sequence[int]) -> list[str]:
    ends = [*fences[1::2], len(lines)] if len(fences) % 2 else fences[1::2]
    return [dedent("\n".join(lines[start + 1 : end])) for start, end in zip(fences[::2], ends, strict=True)]


def _from_first_definition(code: str) -> str:
    """Leave out what is before the first line of code, most often a sentence."""
    code = code.lstrip(" \t\r\n")
    begin = re.search(
        r"^(?:@|async\s+def\s|def\s|class\s|import\s|from\s+[\w.]+\s+import\s|\w+\s*=[^=])", code, re.M
    )
    return code[begin.start() :] if begin else code


def _indent_of(prompt: str) -> str:
    """Return the white space before the last line of a prompt that has some: that of the function's body."""
    found = re.findall(r"^([ \t]+)\S", prompt, re.MULTILINE)
    return found[-1] if found else _DEFAULT_INDENT


def _with_first_indent(code: str, wanted: str) -> str:
    """Give the first line of a body its white space back; all lines, where the whole body lacks it."""
    lines = code.split("\n")
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None or len(_white_space(lines[first])) >= len(wanted):
        return code
    rest = lines[first + 1 :]
    lines[first] = wanted + lines[first].lstrip()
    # A top level has no return, so a body was written without the function's white space.
    if any(re.match(r"return\b|yield\b", line) for line in rest):
        rest = [wanted + line if line.strip() else line for line in rest]
    return "\n".join([*lines[: first + 1], *rest])


def _white_space(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]
