"""Read the files of benchmarks, and say precisely what is wrong with them."""

import csv
import gzip
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import EvaluationError

Kinds = Mapping[str, type | tuple[type, ...]]


def find_folder(path: str, holds: Sequence[str], wanted: str) -> Path:
    """Return the folder that has one of `holds`: the one named, the one above it, or one right below it.

    Args:
        path: as given to `--task-data-path`.
        holds: glob patterns of files that show that it is the right one.
        wanted: what is looked for, for the message.
    """
    named = Path(path)
    if not named.exists():
        raise EvaluationError(f"task_data_path={path} does not exist; check --task-data-path")
    below = sorted(entry for entry in named.iterdir() if entry.is_dir()) if named.is_dir() else []
    for place in (named, *below, named.parent):
        if place.is_dir() and any(next(place.glob(pattern), None) for pattern in holds):
            return place
    raise EvaluationError(f"task_data_path={path} holds no {wanted}; name the folder that has {holds[0]}")


def find_files(path: str, patterns: Sequence[str], wanted: str) -> list[Path]:
    """Return the file named, or those of a folder that fit a pattern."""
    place = Path(path)
    if place.is_file():
        return [place]
    files = sorted({file for pattern in patterns for file in place.glob(pattern)}) if place.is_dir() else []
    if not files:
        raise EvaluationError(
            f"task_data_path={path} holds no {' or '.join(p.removeprefix('*') for p in patterns)} file; {wanted}"
        )
    return files


def read_text(path: Path) -> str:
    """Return the text of a file, which may be compressed with gzip."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path} cannot be read: {error}") from None


def read_json_lines(path: Path, keys: Kinds) -> list[tuple[int, dict[str, Any]]]:
    """Return the records of JSON lines with their line numbers; a file that is one JSON list is read too."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise EvaluationError(
                f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}"
            ) from None
        numbered = list(enumerate(records, 1))
        if numbered and not isinstance(records[0], dict):
            numbered = [(1, records)]
    else:
        # Not splitlines(): it also cuts at characters that JSON allows within a text.
        numbered = [
            (number, _parse(line, f"{path}, line {number}"))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    for number, record in numbered:
        check_keys(record, keys, f"{path}, line {number}")
    return numbered


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None


def check_keys(record: Any, keys: Kinds, where: str) -> None:
    """Raise `EvaluationError` unless a record has keys of these types."""
    for key, kind in keys.items():
        if not isinstance(record, dict) or not isinstance(record.get(key), kind):
            have = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            kinds = kind if isinstance(kind, tuple) else (kind,)
            named = " or ".join(one.__name__ for one in kinds)
            raise EvaluationError(f"{where}: {key} is missing or no {named}; the record has {have}")


def read_csv(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Return the rows of a CSV file.

    Args:
        path: the file.
        columns: names, when the file has no header.
    """
    rows = list(csv.reader(io.StringIO(read_text(path), newline="")))
    names = (
        list(columns) if columns is not None else [name.lstrip("\ufeff") for name in rows[0]] if rows else []
    )
    body = rows if columns is not None else rows[1:]
    found = []
    for number, row in enumerate(body, 1 if columns is not None else 2):
        if row and len(row) != len(names):
            raise EvaluationError(
                f"{path}, row {number}: {len(row)} columns instead of {len(names)} ({', '.join(names)})"
            )
        if row:
            found.append(dict(zip(names, row, strict=True)))
    return found


def letter_index(letter: str, where: str, letters: str = "ABCD") -> int:
    """Return the number of an answer letter."""
    if len(letter) != 1 or letter not in letters:
        raise EvaluationError(f"{where}: answer={letter!r} is none of {', '.join(letters)}")
    return letters.index(letter)


def not_empty(records: Sequence[Any], files: Iterable[Path], wanted: str) -> None:
    """Raise `EvaluationError` when nothing was read."""
    if not records:
        first = next(iter(files), None)
        raise EvaluationError(f"{first} holds no record; {wanted}")
