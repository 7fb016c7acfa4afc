"""Read small files: configs, manifests, trackers, recipes, prompts.

This is the one place that decodes and parses them, so each is checked for encoding, syntax and shape before a value of
it is used. A contract test refuses `read_text` and `json.load` elsewhere. Weights, tokens and records are large; their
readers check them as they go.
"""

import codecs
import json
from collections.abc import Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from ascendspeed_data.errors import AscendSpeedError, DataError

Shape = TypeVar("Shape")

COPY_AGAIN = "copy it again"
"""Remedy for files that programs write."""

JsonObject = dict[str, Any]
"""The shape of a file that must be an object, whatever it holds."""


def read_text(
    path: Path,
    name: str = "",
    remedy: str = COPY_AGAIN,
    error: type[AscendSpeedError] = DataError,
    option: str = "the path",
) -> str:
    """Read a text file in UTF-8.

    Args:
        path: the file.
        name: how to name it in messages; its path by default.
        remedy: what the user should do when it is damaged, for messages.
        error: class of the error.
        option: what to check when the file does not exist, for messages.

    Raises:
        DataError: or `error`: it does not exist, cannot be read, or is not UTF-8.
    """
    name = name or str(path)
    return _decode(_read_bytes(path, name, error, option), name, remedy, error)


def read_json(
    path: Path,
    shape: type[Shape],
    name: str = "",
    remedy: str = COPY_AGAIN,
    error: type[AscendSpeedError] = DataError,
    option: str = "the path",
) -> Shape:
    """Read a JSON file whose content has a certain shape.

    Args:
        path: the file.
        shape: a type that pydantic checks strictly: `JsonObject`, `dict[str, str]`, a `TypedDict`, a model.
        name: how to name the file in messages; its path by default.
        remedy: what the user should do when it is damaged, for messages.
        error: class of the error.
        option: what to check when the file does not exist, for messages.

    Raises:
        DataError: or `error`: it cannot be read, is not JSON, or has another shape.
    """
    text = read_text(path, name, remedy, error, option)
    return parse_json(text, shape, name or str(path), remedy, error)


def read_json_lines(
    path: Path, shape: type[Shape], remedy: str = COPY_AGAIN, error: type[AscendSpeedError] = DataError
) -> tuple[list[Shape], bool]:
    """Read a file of JSON lines that a program appends to, and that a crash may have cut.

    Args:
        path: the file.
        shape: of each line, as in `read_json`.
        remedy: what the user should do when it is damaged, for messages.
        error: class of the error.

    Returns:
        The values of the complete lines, and whether something without a line end follows them.

    Raises:
        DataError: or `error`: the file cannot be read, or a complete line is not JSON of that shape.
    """
    # A killed process may have left half a character, so lines are cut before they are decoded.
    *lines, rest = _read_bytes(path, str(path), error).split(b"\n")
    values = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        values.append(parse_json(_decode(line, where, remedy, error), shape, where, remedy, error))
    return values, bool(rest)


def read_toml(
    path: Path, name: str = "", error: type[AscendSpeedError] = DataError, option: str = "the path"
) -> JsonObject:
    """Read a TOML file.

    Args:
        path: the file.
        name: how to name it in messages; its path by default.
        error: class of the error.
        option: what to check when the file does not exist, for messages.

    Raises:
        DataError: or `error`: it cannot be read, or is not TOML.
    """
    import tomllib

    name = name or str(path)
    try:
        return tomllib.loads(read_text(path, name, "save it as UTF-8", error, option))
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as cause:
        reason = "it is nested too deeply" if isinstance(cause, RecursionError) else cause
        raise error(f"{name} is not TOML: {reason}; correct it") from None


def parse_json(
    text: str,
    shape: type[Shape],
    where: str,
    remedy: str = COPY_AGAIN,
    error: type[AscendSpeedError] = DataError,
) -> Shape:
    """Parse JSON whose content has a certain shape.

    Refused are also what Python's parser lets pass: NaN and Infinity, a key that an object has twice, half a surrogate
    pair, and numbers that no 64-bit number holds.

    Args:
        text: the JSON.
        shape: as in `read_json`.
        where: file, or file and line, for messages.
        remedy: what the user should do when it is damaged, for messages.
        error: class of the error.

    Raises:
        DataError: or `error`: it is not JSON, or has another shape.
    """
    try:
        value = json.loads(
            text, parse_constant=_refuse_constant, parse_int=_integer, parse_float=_number,
            object_pairs_hook=_without_doubles,
        )  # fmt: skip
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as cause:
        raise error(f"{where} is not JSON: {cause}; {remedy}") from None
    except UnicodeEncodeError:
        raise error(f"{where} is not JSON: it holds half a surrogate pair; {remedy}") from None
    except RecursionError:
        raise error(f"{where} is not JSON: it is nested too deeply; {remedy}") from None
    except ValueError as cause:
        raise error(f"{where} is not JSON: {cause}; {remedy}") from None
    return check_shape(value, shape, where, remedy, error)


def check_shape(
    value: Any, shape: type[Shape], where: str, remedy: str, error: type[AscendSpeedError] = DataError
) -> Shape:
    """Return a value if it has a certain shape; see `parse_json`."""
    from pydantic import ValidationError

    try:
        # As JSON, so that strictly a list may be a tuple but a text no number.
        return cast(Shape, _adapter(cast(Hashable, shape)).validate_json(json.dumps(value), strict=True))
    except ValidationError as cause:
        first = cause.errors()[0]
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
        rule = f"{message[:1].lower()}{message[1:]}".replace("a valid dictionary", "a valid object")
        at = ".".join(map(str, first["loc"]))
        found = f": {at}={_shown(first['input'])}" if at else f" holds {_shown(first['input'])}"
        raise error(f"{where}{found}, but {rule}; {remedy}") from None


def _read_bytes(path: Path, name: str, error: type[AscendSpeedError], option: str = "the path") -> bytes:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        raise error(f"{name} does not exist; check {option}") from None
    except (OSError, ValueError) as cause:
        reason = (cause.strerror if isinstance(cause, OSError) else None) or str(cause)
        raise error(f"{name} cannot be read: {reason}; check the file and its permissions") from None


def _decode(content: bytes, name: str, remedy: str, error: type[AscendSpeedError]) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{name} is not UTF-8 ({cause.reason} at byte {cause.start}); {remedy}") from None


@cache
def _adapter(shape: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(shape)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    # Python itself refuses integers of more than 4,300 digits.
    if len(digits) > 20 or not -(1 << 63) <= int(digits) < 1 << 64:
        raise ValueError(f"{digits[:20]}... has more than 64 bits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{digits} is larger than any number")
    return value


def _without_doubles(pairs: Sequence[tuple[str, Any]]) -> JsonObject:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(n for n in names if names.count(n) > 1)!r} twice")
    return found
