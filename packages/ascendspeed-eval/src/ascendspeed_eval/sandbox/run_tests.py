"""The process of the tests: run them on functions of the answer, and say whether they passed.

Runs in the processes of the sandbox, so it imports only the standard library.
"""

import builtins
import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from ascendspeed_eval.sandbox.calls import shareable_classes
from ascendspeed_eval.sandbox.remote import AnswerGoneError, TestsSide
from ascendspeed_eval.sandbox.values import Frames

MAX_REASON = 200


class Verdict(NamedTuple):
    """What the tests say.

    Attributes:
        passed: they ran to their end without an exception.
        reason: `passed`, the exception, or how the answer ended.
        own_operations: how often operators or names of the answer decided in a test.
        answer_ended: the process of the answer ended before the tests did.
    """

    passed: bool
    reason: str
    own_operations: int
    answer_ended: bool


class TestNames(dict[str, Any]):
    """Global names of the tests; those that neither tests nor prompt define come from the answer."""

    side: TestsSide

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        value = self.side.ask(["value"], [name])
        self.side.own_operations += 1
        self[name] = value
        return value


def run_tests(frames: Frames, job: Mapping[str, str]) -> Verdict:
    """Define the answer's program, then run the tests.

    Args:
        frames: messages to and from the process of the answer.
        job: `program`, the answer with its prompt; `prompt`, whose names the tests may use; `tests`, which define
            `check`; `entry_point`, the function that `check` takes.
    """
    side = TestsSide(frames)
    names = TestNames()
    names.side = side
    try:
        _run_prompt(job["prompt"], names)
        side.share_classes(shareable_classes(names))
        side.ask(["define"], [job["program"], sorted(side.classes)])
        candidate = side.ask(["value"], [job["entry_point"]])
        if job["entry_point"].isidentifier():
            names[job["entry_point"]] = candidate
        exec(compile(job["tests"], "tests.py", "exec"), names)
        names["check"](candidate)
    except AnswerGoneError:
        pass
    except BaseException as error:  # noqa: BLE001 - whatever it is, the tests did not pass
        return Verdict(False, describe(error), side.own_operations, side.broken == "ended")
    if side.broken is not None:
        return Verdict(False, f"the program {side.broken}", side.own_operations, side.broken == "ended")
    return Verdict(True, "passed", side.own_operations, False)


def _run_prompt(prompt: str, names: dict[str, Any]) -> None:
    """Define what the prompt defines; it ends with a function that has no body yet, or only a docstring."""
    for ending in ("", "    pass\n", "\n    pass\n", "\tpass\n"):
        try:
            code = compile(prompt + ending, "prompt.py", "exec")
        except (SyntaxError, ValueError):
            continue
        with contextlib.suppress(Exception):  # The program has the same lines, and fails for the same reason.
            exec(code, names)
        return


def describe(error: BaseException) -> str:
    """Return the last line that Python would print of an exception, printable and short."""
    try:
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
    except Exception:  # noqa: BLE001 - an exception may break when it is shown
        said = type(error).__name__
    return "".join(c if c.isprintable() else " " for c in said)[:MAX_REASON]
