"""Read the files of benchmarks; errors name file, line and what is wrong."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.small_files import KeyTypes, check_keys, parse_json, read_text


def find_folder(path: str, patterns: Sequence[str], wanted: str) -> Path:
    """Return the folder with a file of `patterns`: the folder named, its parent, or a folder directly inside it.

    Args:
        path: as given to `--task-data-path`.
        patterns: glob patterns; the right folder matches at least one.
        wanted: what the folder should contain, for the message.
    """
    named = Path(path)
    if not named.exists():
        if path == "sample":
            raise EvaluationError(
                f"task_data_path=sample: only boolq has a sample; give the folder with the {wanted}"
            )
        raise EvaluationError(f"task_data_path={path} does not exist; check --task-data-path")
    below = sorted(entry for entry in named.iterdir() if entry.is_dir()) if named.is_dir() else []
    for folder in (named, *below, named.parent):
        if folder.is_dir() and any(next(folder.glob(pattern), None) for pattern in patterns):
            return folder
    raise EvaluationError(f"task_data_path={path} has no {wanted}; give the folder with {patterns[0]}")


def find_files(path: str, patterns: Sequence[str], wanted: str) -> list[Path]:
    """Return the file named, or the files of the folder that match a pattern."""
    named = Path(path)
    if named.is_file():
        return [named]
    files = sorted({file for pattern in patterns for file in named.glob(pattern)}) if named.is_dir() else []
    if not files:
        if path == "sample" and not named.exists():
            raise EvaluationError(
                f"task_data_path=sample: only boolq has a sample; give a file or folder: {wanted}"
            )
        raise EvaluationError(
            f"task_data_path={path} has no {' or '.join(p.removeprefix('*') for p in patterns)} file; {wanted}"
        )
    return files


def read_json_lines(path: Path, keys: KeyTypes) -> list[tuple[int, dict[str, Any]]]:
    """Return the records of a JSON-lines file, or of one JSON list, with their line numbers."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        records = parse_json(text, str(path))
        numbered = list(enumerate(records, 1))
        if numbered and not isinstance(records[0], dict):
            numbered = [(1, records)]
    else:
        # Not splitlines(), which also splits at characters that JSON allows inside a string.
        numbered = [
            (number, parse_json(line, f"{path}, line {number}"))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    for number, record in numbered:
        check_keys(record, keys, f"{path}, line {number}")
    return numbered


def read_csv(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Return the rows of a CSV file.

    Args:
        path: the file.
        columns: column names, if the file has no header.
    """
    try:
        rows = list(csv.reader(io.StringIO(read_text(path), newline="")))
    except csv.Error as error:
        raise EvaluationError(f"{path}: not CSV: {error}; copy it again") from None
    names = list(columns) if columns is not None else rows[0] if rows else []
    if len(set(names)) < len(names):
        raise EvaluationError(f"{path}: its header has a column twice ({', '.join(names)}); correct it")
    body = rows if columns is not None else rows[1:]
    found = []
    for number, row in enumerate(body, 1 if columns is not None else 2):
        if row and len(row) != len(names):
            raise EvaluationError(
                f"{path}, row {number}: {len(row)} columns, expected {len(names)} ({', '.join(names)})"
            )
        if row:
            found.append(dict(zip(names, row, strict=True)))
    return found


def letter_index(letter: str, where: str, letters: str = "ABCD") -> int:
    """Return the index of an answer letter."""
    if len(letter) != 1 or letter not in letters:
        raise EvaluationError(f"{where}: answer={letter!r} is not one of {', '.join(letters)}")
    return letters.index(letter)


def not_empty(records: Sequence[Any], files: Iterable[Path], wanted: str) -> None:
    """Raise `EvaluationError` if there is no record."""
    if not records:
        first = next(iter(files), None)
        raise EvaluationError(f"{first} has no record; {wanted}")
