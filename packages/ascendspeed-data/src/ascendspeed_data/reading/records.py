"""Read the records of a shard."""

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from ascendspeed_data.errors import DataError
from ascendspeed_data.reading.inputs import format_of, read_errors
from ascendspeed_data.reading.nested import records_of_batch
from ascendspeed_data.reading.shards import READ_BYTES, Shard, shards_of_file
from ascendspeed_data.sample import Record, text_in


def records_of_shard(shard: Shard) -> Iterator[tuple[int, Record]]:
    """Yield the records of a shard with their index in it; for files of lines, the index of the line.

    Each line of a `.txt` file is a record with the column `text`.

    Raises:
        DataError: a record is damaged; the message names its line.
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
        import pyarrow

        try:
            records = list(records_of_batch(content))
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:
            raise DataError(
                f"{shard.path}, records {shard.start + 1} to {shard.end}: {error}; the file is damaged"
            ) from None
        yield from enumerate(records)


def _line_records(shard: Shard, content: bytes) -> Iterator[tuple[int, Record]]:
    is_text = format_of(shard.path) == ".txt"
    # Line by line, so that memory holds no unnecessary copy of a large document.
    for number, raw in enumerate(io.BytesIO(content)):
        try:
            line = raw.decode("utf-8-sig" if number == shard.start == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{location_of(shard, number)} cannot be read as UTF-8: {error.reason}") from None
        if is_text:
            if "\0" in line:
                raise DataError(
                    f"{location_of(shard, number)}: contains a NUL byte, so it is not text; repair the file"
                )
            yield number, {"text": line.removesuffix("\n").removesuffix("\r")}
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if not line.strip():
                continue
            hint = "; the line contains NUL bytes, as files do after a crash" if "\0" in line else ""
            raise DataError(
                f"{location_of(shard, number)}: not JSON: {error.msg} at column {error.colno}{hint}"
            ) from None
        except (RecursionError, ValueError) as error:
            reason = (
                "JSON is nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
            )
            raise DataError(f"{location_of(shard, number)}: {reason}") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{location_of(shard, number)}: expected a JSON object, found {type(record).__name__}"
            )
        yield number, record


def location_of(shard: Shard, number: int) -> str:
    """Return file and line (or record number) of a record, for messages."""
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
        DataError: the file has no records or is damaged; the message names the line.
    """
    empty = True
    for shard in shards_of_file(path, 0, 0, READ_BYTES, columns):
        for _, record in records_of_shard(shard):
            empty = False
            yield record
    if empty:
        raise no_record_error(path)


def no_record_error(path: Path) -> DataError:
    """Return the error for an input without records."""
    return DataError(f"{path} has no records; remove it from --input")


def check_columns(record: Record, wanted: Sequence[str], reason: str) -> None:
    """Raise `DataError` unless a record has the columns; the message lists the columns that it has."""
    missing = [column for column in wanted if column not in record]
    if missing:
        raise DataError(f"no column {missing[0]!r} ({reason}); the record has {', '.join(map(str, record))}")


def text_of(record: Record, key: str) -> str:
    """Return the text in a column of a record; null is an empty text.

    Raises:
        DataError: the column is missing or does not hold text.
    """
    check_columns(record, [key], "--json-key")
    return text_in(record, key)
