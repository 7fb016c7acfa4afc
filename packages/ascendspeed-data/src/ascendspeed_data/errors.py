"""Errors that the command line shows as one line.

A message names the field, its value, the rule and the remedy. Any other exception is a bug and keeps its traceback.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class AscendSpeedError(Exception):
    """A file, a device or another process caused an error."""

    exit_code = 1


class ConfigError(AscendSpeedError):
    """The arguments or the config are wrong, whatever the files contain."""

    exit_code = 2


class DataError(AscendSpeedError):
    """A dataset, tokenizer or manifest is missing, damaged or does not match."""


def not_downloaded(path: Path) -> str:
    """Return how to get a model of the Hugging Face hub whose name was given for a folder, or an empty string."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path)) and not path.parent.exists()
    if not is_name:
        return ""
    folder = path.name
    return (
        f"it looks like a name on the Hugging Face hub, from which nothing is downloaded here: "
        f"`hf download {path} --local-dir {folder}`, and give {folder}"
    )


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean X?"` for the closest of `choices`, or an empty string."""
    close = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""
