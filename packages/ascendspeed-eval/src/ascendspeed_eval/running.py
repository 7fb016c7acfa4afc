"""Run an application: its result or its error becomes an exit status and at most one line on stderr.

A copy of `ascendspeed_data.command_line.running`, because this package imports no other; a test keeps both equal.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import typer

from ascendspeed_eval.command_line import HINTS, REMEDIES, choices_of
from ascendspeed_eval.errors import did_you_mean
from ascendspeed_eval.stopping import NO_SPACE, no_space

INTERRUPTED = 130
"""Exit status of a command that Ctrl-C ended."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: exit status.
        error: what the user must know, in one line; empty for nothing.
    """

    status: int
    error: str = ""


def run_and_exit(app: typer.Typer, name: str) -> NoReturn:
    """Run an application on this process's command line, and end the process.

    What is done stays done: while Python ends, one Ctrl-C changes nothing, and a second one kills.
    """
    try:
        outcome = outcome_of(app, name, sys.argv[1:])
        _leave_to_the_end()
    except KeyboardInterrupt:
        # A second Ctrl-C, while the first was being answered.
        _leave_to_the_end()
        outcome = _interrupted()
    sys.exit(_say(outcome, name))


def run_app(app: typer.Typer, name: str, args: Sequence[str]) -> int:
    """Run an application inside a process that goes on, and return its exit status, see `outcome_of`."""
    return _say(outcome_of(app, name, args), name)


def outcome_of(app: typer.Typer, name: str, args: Sequence[str]) -> Outcome:
    """Run an application; errors for the user become one line.

    Exit 2: the arguments or the config are wrong. Exit 1: a file, a device or another process caused an error.
    Exit 130: interrupted. Any other exception is a bug and keeps its traceback.
    """
    command = typer.main.get_command(app)
    words = without_local_rank(args)
    if words and words[0].startswith("--local-rank"):
        return Outcome(2, f"{words[0]} is for processes of a launcher, which sets LOCAL_RANK too")
    try:
        result = command.main(args=words, prog_name=name, standalone_mode=False)
        # What is printed belongs to the command: without space for it the command has failed.
        sys.stdout.flush()
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return Outcome(2)
        return Outcome(error.exit_code, _one_line(error, words))
    except BrokenPipeError:
        sys.stderr.close()
        return Outcome(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            return Outcome(1, f"{no_space(error)}, and run the same command again")
        # Errors for the user, also those of backends in other packages, have an exit status.
        status = getattr(error, "exit_code", None)
        if not isinstance(status, int):
            raise
        return Outcome(status, str(error))
    if result == INTERRUPTED:
        # Typer returns this for Ctrl-C, and says nothing.
        return _interrupted()
    return Outcome(result if isinstance(result, int) else 0)


def without_local_rank(words: Sequence[str]) -> list[str]:
    """Leave out the --local-rank that torch.distributed.launch puts before the command; LOCAL_RANK says it too."""
    first = words[0].replace("_", "-") if words else ""
    if not first.startswith("--local-rank"):
        return list(words)
    if "LOCAL_RANK" not in os.environ:
        return ["--local-rank"]
    return list(words[1:] if "=" in first else words[2:])


def _leave_to_the_end() -> None:
    """Let this process end in peace: the next Ctrl-C changes nothing, and the one after it kills."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.SIG_DFL))


def _interrupted() -> Outcome:
    """Say that Ctrl-C ended the command; the launcher of several processes says it for them."""
    if "ASCENDSPEED_LAUNCHED" in os.environ and "RANK" in os.environ:
        return Outcome(INTERRUPTED)
    return Outcome(INTERRUPTED, "interrupted; run the same command again")


def _say(outcome: Outcome, name: str) -> int:
    """Print the error, if there is one, and return the exit status."""
    if outcome.error:
        try:
            sys.stdout.flush()
        except OSError:
            # Python would try again as it ends, and complain of it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"{name}: error: {' '.join(outcome.error.splitlines())}", file=sys.stderr)
    return outcome.status


def _one_line(error: typer.TyperException, words: Sequence[str]) -> str:
    """Return an error of Typer as one line, with the wrong value and similar flags."""
    line = " ".join(error.format_message().split()).replace("Value error, ", "")
    line = re.sub(
        r" \(Possible options: (.*)\)$", lambda m: f"; did you mean {m[1].replace(', ', ' or ')}?", line
    )
    flags = getattr(getattr(error, "param", None), "opts", ())
    values = [" ".join(_values_after(words, number)) for number, word in enumerate(words) if word in flags]
    if values:
        line = line.replace("Invalid value for", f"Invalid value {values[-1]!r} for", 1)
        choices = choices_of(getattr(error, "param", None))
        hint = HINTS.get(values[-1].lower().replace("_", "-"))
        remedy = next((REMEDIES[flag, values[-1]] for flag in flags if (flag, values[-1]) in REMEDIES), None)
        if remedy:
            line = f"{line.rstrip('.')}; {remedy}"
        elif hint and hint.split()[0] in choices:
            line = f"{line.rstrip('.')}; did you mean {hint}?"
        elif choices:
            line = line.rstrip(".") + did_you_mean(values[-1], choices)
    return line


def _values_after(words: Sequence[str], number: int) -> list[str]:
    """Return what follows a flag: the next word, and those after it up to another flag."""
    following = list(words[number + 1 :])
    end = next(
        (position for position, word in enumerate(following) if position and word.startswith("--")), None
    )
    return following[:end]
