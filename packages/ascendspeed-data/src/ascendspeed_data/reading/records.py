"""Read the records of a shard."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ascendspeed_data.errors import DataError
from ascendspeed_data.reading.inputs import format_of, read_errors
from ascendspeed_data.reading.shards import READ_BYTES, Record, Shard, shards_of


def records_of(shard: Shard) -> Iterator[tuple[int, Record]]:
    """Yield the records of a shard with their number in it (of lines: the line's), from 0.

    A `.txt` is one record per line, its column `text`.

    Raises:
        DataError: something is damaged; the message names the line.
    """
    content = shard.content
    if content is None:
        with read_errors(shard.path), shard.path.open("rb") as file:
            file.seek(shard.start)
            content = file.read(shard.end - shard.start)
    if isinstance(content, bytes):
        yield from _line_records(shard, content)
    elif isinstance(content, list):
        yield from enumerate(content)
    else:
        yield from enumerate(content.to_pylist())


def _line_records(shard: Shard, content: bytes) -> Iterator[tuple[int, Record]]:
    is_text = format_of(shard.path) == ".txt"
    # Line by line: of a large document no copy more than needed is held.
    for number, raw in enumerate(io.BytesIO(content)):
        try:
            line = raw.decode("utf-8-sig" if number == shard.start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{place_of(shard, number)} cannot be read as UTF-8: {error.reason}") from None
        if is_text:
            if "\0" in line:
                raise DataError(
                    f"{place_of(shard, number)}: holds a NUL byte, so it is no text; repair the file"
                )
            yield number, {"text": line.removesuffix("\n").removesuffix("\r")}
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if not line.strip():
                continue
            hint = "; the line holds NUL bytes, as after a crash" if "\0" in line else ""
            raise DataError(
                f"{place_of(shard, number)}: not JSON: {error.msg} at column {error.colno}{hint}"
            ) from None
        except RecursionError:
            raise DataError(f"{place_of(shard, number)}: not a record: nested too deeply") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{place_of(shard, number)}: not an object with columns but {type(record).__name__}"
            )
        yield number, record


def place_of(shard: Shard, number: int) -> str:
    """Return file and line, or file and record, of a record of a shard."""
    if isinstance(shard.content, bytes):
        return f"{shard.path}, line {shard.first_line + number}"
    if shard.content is not None:
        return f"{shard.path}, record {shard.start + number + 1}"
    return f"{shard.path}, line {_lines_before(shard) + number + 1}"


def _lines_before(shard: Shard) -> int:
    count, left = 0, shard.start
    with shard.path.open("rb") as file:
        while left:
            read = file.read(min(READ_BYTES, left))
            count += read.count(b"\n")
            left -= len(read)
    return count


def read_records(path: Path, columns: Sequence[str] | None = None) -> Iterator[Record]:
    """Yield the records of one file in order.

    Raises:
        DataError: the file is empty or damaged; the message names the line.
    """
    empty = True
    for shard in shards_of(path, 0, 0, READ_BYTES, columns):
        for _, record in records_of(shard):
            empty = False
            yield record
    if empty:
        raise no_record(path)


def no_record(path: Path) -> DataError:
    """Return the complaint about an input without records."""
    return DataError(f"{path} holds no record; remove it from --input")


def check_columns(record: Record, wanted: Sequence[str], option: str) -> None:
    """Raise `DataError` unless a record has the columns; the message lists what it has."""
    missing = [column for column in wanted if column not in record]
    if missing:
        raise DataError(f"no column {missing[0]!r}; there are {', '.join(map(str, record))} ({option})")


def text_of(record: Record, key: str) -> str:
    """Return the text in one column of a record.

    Raises:
        DataError: no such column, or no text in it.
    """
    check_columns(record, [key], "--json-key")
    value: Any = record[key]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {key!r} holds {type(value).__name__}, not text")
    return value
