"""Errors that the command line shows as one line.

ascendspeed-eval imports none of the other packages, so it has its own error classes.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class EvaluationError(Exception):
    """A file, a model or a server caused an error."""

    exit_code = 1


class UsageError(EvaluationError):
    """The arguments alone are wrong."""

    exit_code = 2


class ScoringError(EvaluationError):
    """An answer cannot be scored; its sample fails, and the run goes on."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean X?"` for the closest of `choices`, or an empty string."""
    close = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""
