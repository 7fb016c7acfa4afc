"""Errors that are shown to the user as one line, and nothing else.

Every message names the field, its value, the rule and the remedy. A bug is any other exception and keeps
its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class AscendSpeedError(Exception):
    """Something that needed a file, a device or a peer went wrong."""

    exit_code = 1


class ConfigError(AscendSpeedError):
    """The arguments or the config alone are wrong; nothing had to be opened to see it."""

    exit_code = 2


class DataError(AscendSpeedError):
    """A dataset, tokenizer or manifest is missing, damaged or does not fit."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean X?"` for the closest of `choices`, or an empty string."""
    close = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""
