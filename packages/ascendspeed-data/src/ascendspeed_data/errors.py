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
    """Return what to do where a path that does not exist may be a name on the Hugging Face hub, or an empty string."""
    name = str(path)
    if re.fullmatch(r"[A-Za-z0-9][\w-]*", name):
        return f"a name on the Hugging Face hub has its owner before it, or hf: (hf:{name})"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        return ""
    if path.parent.exists():
        return f"{path.parent} is a folder here, so it is no name on the Hugging Face hub; for that give hf:{name}"
    return (
        f"it looks like a name on the Hugging Face hub, which is not fetched here: `hf download {name} --local-dir "
        f"{path.name}`, and give {path.name}"
    )


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean X?"` for the closest of `choices`, or an empty string."""
    close = get_close_matches(name, list(choices), n=1)
    return f"; did you mean {close[0]}?" if close else ""
