"""Read files: benchmarks, tasks, templates, and what earlier runs wrote.

This is the one place that decodes and parses them, so each is checked for encoding, syntax and shape before a value of
it is used. A contract test refuses `read_text` and `json.load` elsewhere. The other packages have their own in
`ascendspeed_data.small_files`, which this package does not import.
"""

import codecs
import gzip
import json
import tomllib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ascendspeed_eval.errors import EvaluationError

KeyTypes = Mapping[str, type | tuple[type, ...]]
"""Keys that an object must have, and their types."""


def read_text(path: Path, name: str = "", option: str = "the path") -> str:
    """Return the text of a file in UTF-8; `.gz` is decompressed.

    Args:
        path: the file.
        name: how to name it in messages; its path by default.
        option: what to check when the file does not exist, for messages.

    Raises:
        EvaluationError: it does not exist, cannot be read, or is not UTF-8.
    """
    name = name or str(path)
    content = read_bytes(path, name, option)
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{name} cannot be read: it is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None


def read_bytes(path: Path, name: str = "", option: str = "the path") -> bytes:
    """Return the content of a file, see `read_text`."""
    name = name or str(path)
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except FileNotFoundError:
        raise EvaluationError(f"{name} does not exist; check {option}") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise EvaluationError(f"{name} cannot be read: {error}; copy it again") from None


def read_toml(path: Path, name: str = "", option: str = "the path") -> dict[str, Any]:
    """Read a TOML file, see `read_text`.

    Raises:
        EvaluationError: it cannot be read, or is not TOML.
    """
    name = name or str(path)
    try:
        return tomllib.loads(read_text(path, name, option))
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise EvaluationError(f"{name} is not TOML: {reason}; correct it") from None


def parse_json(text: str, where: str, allow_surrogates: bool = False) -> Any:
    """Parse JSON.

    Args:
        text: the JSON.
        where: begins messages.
        allow_surrogates: let half a surrogate pair through, as texts of models have it.

    Raises:
        EvaluationError: it is not JSON; the message begins with `where`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_refuse_constant)
        if not allow_surrogates and "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        at = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise EvaluationError(
            f"{where}{at}: not JSON: {error.msg} at column {error.colno}; correct the file"
        ) from None
    except UnicodeEncodeError:
        raise EvaluationError(
            f"{where}: not JSON: it holds half a surrogate pair; correct the file"
        ) from None
    except RecursionError:
        raise EvaluationError(f"{where}: not JSON: it is nested too deeply; correct the file") from None
    except ValueError as error:
        raise EvaluationError(f"{where}: not JSON: {error}; correct the file") from None
    return value


def check_keys(record: Any, keys: KeyTypes, where: str) -> None:
    """Raise `EvaluationError` unless a record is an object that has keys of these types."""
    if not isinstance(record, dict):
        raise EvaluationError(
            f"{where}: it is no object with {', '.join(keys) or 'keys'}, but {type(record).__name__}; correct the file"
        )
    for key, kind in keys.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not is_a(record.get(key), kinds):
            have = ", ".join(map(str, record))
            named = " or ".join(one.__name__ for one in kinds)
            raise EvaluationError(f"{where}: {key} is missing or not {named}; the record has {have}")


def is_a(value: Any, kinds: tuple[type, ...]) -> bool:
    """Tell whether a value has one of these types; true and false are no numbers."""
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds or object in kinds)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}, which is no number")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(n for n in names if names.count(n) > 1)!r} twice")
    return found
