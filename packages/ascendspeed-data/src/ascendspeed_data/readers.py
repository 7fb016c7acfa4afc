"""Read documents from files, one after the other, in order, without holding a file in memory."""

import csv
import glob
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ascendspeed_data.errors import ConfigError, DataError

TEXT_FORMATS = (".jsonl", ".json", ".csv", ".txt")
COLUMN_FORMATS = (".parquet", ".arrow")
Record = dict[str, Any]


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths, folders and globs name, folders and globs sorted by name.

    Raises:
        ConfigError: an ending that is not read.
        DataError: a pattern that names nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.is_file() and _format_of(p))
        else:
            matches = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(pattern))]  # noqa: PTH207 - absolute patterns
        if not matches:
            raise DataError(f"input {pattern} names no file that can be read; check --input")
        found += matches
    for path in found:
        if _format_of(path) is None:
            known = ", ".join((*TEXT_FORMATS, *COLUMN_FORMATS))
            raise ConfigError(
                f"input {path} has an ending that is not read; read are {known}, the first four also .gz"
            )
    return found


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of one file in order; a `.txt` is one record per line, its column `text`.

    Raises:
        DataError: the file is empty or damaged; the message names the line.
    """
    reader = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".txt": _read_lines,
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
    }[str(_format_of(path))]
    empty = True
    try:
        for record in reader(path):
            empty = False
            yield record
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, OSError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if empty:
        raise DataError(f"{path} holds no record; remove it from --input")


def text_of(record: Record, key: str, path: Path, number: int) -> str:
    """Return the text in one column of a record.

    Raises:
        DataError: no such column, or no text in it.
    """
    if key not in record:
        raise DataError(
            f"{path}: record {number} has no column {key!r}; it has {', '.join(record)} (--json-key)"
        )
    value = record[key]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{path}: record {number}: column {key!r} holds {type(value).__name__}, not text")
    return value


def _format_of(path: Path) -> str | None:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    known = TEXT_FORMATS if path.suffix == ".gz" else (*TEXT_FORMATS, *COLUMN_FORMATS)
    return suffix if suffix in known else None


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _read_lines(path: Path) -> Iterator[Record]:
    with _open_text(path) as file:
        for line in file:
            yield {"text": line.rstrip("\r\n")}


def _read_json_lines(path: Path) -> Iterator[Record]:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _record(_parse(line, f"{path}, line {number}"), f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[Record]:
    """Read a list of objects; a file that begins with an object is read as JSON lines, as such files often are."""
    with _open_text(path) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        if first != "[":
            yield from _read_json_lines(path)
            return
        file.seek(0)
        values = _parse(file.read(), str(path))
    for number, value in enumerate(values, 1):
        yield _record(value, f"{path}, record {number}")


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    with _open_text(path) as file:
        yield from csv.DictReader(file)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from None


def _read_arrow(path: Path) -> Iterator[Record]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                opened = pyarrow.ipc.open_file(source)
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            for batch in batches:
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a whole Arrow file: {error}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None


def _record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: not an object with columns but {type(value).__name__}")
    return value
