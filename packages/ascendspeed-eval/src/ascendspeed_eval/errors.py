"""Errors that are shown to the user as one line; the same as in the other packages, none of which is imported."""

from collections.abc import Iterable
from difflib import get_close_matches


class EvaluationError(Exception):
    """Something that needed a file, a model or a peer went wrong."""

    exit_code = 1


class UsageError(EvaluationError):
    """The arguments alone are wrong."""

    exit_code = 2


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean X?"` for the closest of `choices`, or an empty string."""
    close = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""
