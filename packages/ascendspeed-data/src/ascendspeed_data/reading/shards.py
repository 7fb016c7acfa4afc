"""Split inputs into shards of a few megabytes, the units of work of a worker.

A shard starts and ends at an offset of its file: a byte for files of lines, a record for other files. An interrupted
run can resume at any shard.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ascendspeed_data.errors import DataError
from ascendspeed_data.reading.inputs import format_of, is_compressed, open_bytes, read_errors
from ascendspeed_data.sample import Record

MAX_RECORD_BYTES = 1 << 27
"""Maximum size of a line or record; a longer one is an error, because the file is damaged or a decompression bomb."""

READ_BYTES = 1 << 20
ARROW_ROWS_PER_SHARD = 1000


@dataclass(frozen=True)
class Shard:
    """A contiguous part of one input.

    Attributes:
        input_index: index of the input in the run.
        path: path of the input.
        start: offset of the first byte (files of lines) or record (other files).
        end: offset after the last byte or record.
        content: decompressed lines, records, or a pyarrow batch; `None` if the worker itself reads the bytes from
            `start` to `end`.
        first_line: number of the first line, for messages; 0 if unknown.
        unread_columns: columns of the input that the records lack, because only some columns were to be read.
    """

    input_index: int
    path: Path
    start: int
    end: int
    content: bytes | list[Record] | Any = None
    first_line: int = 0
    unread_columns: tuple[str, ...] = ()


Reader = Callable[[Path, int, int, int], Iterator[Shard]]


def shards_of_file(
    path: Path, input_index: int, start: int, shard_bytes: int, columns: Sequence[str] | None = None
) -> Iterator[Shard]:
    """Split one file into shards, from the offset `start`.

    Args:
        path: the file.
        input_index: index of the file in the run.
        start: first byte or record.
        shard_bytes: approximate size of a shard.
        columns: columns to read from formats that store columns separately; `None` for all.

    Raises:
        DataError: the file is damaged.
    """
    kind = format_of(path)
    with read_errors(path):
        if kind == ".parquet":
            yield from _parquet_shards(path, input_index, start, shard_bytes, columns)
        elif kind == ".arrow":
            yield from _arrow_shards(path, input_index, start)
        elif kind == ".csv":
            yield from _csv_shards(path, input_index, start, shard_bytes)
        elif kind == ".json" and _begins_with_bracket(path):
            yield from _record_shards(path, input_index, start, shard_bytes, _json_records(path))
        elif is_compressed(path):
            yield from _compressed_line_shards(path, input_index, start, shard_bytes)
        else:
            yield from _line_shards(path, input_index, start, shard_bytes)


def _line_shards(path: Path, input_index: int, start: int, shard_bytes: int) -> Iterator[Shard]:
    size = path.stat().st_size
    with path.open("rb") as lines:
        while start < size:
            lines.seek(min(start + shard_bytes, size) - 1)
            last = lines.readline(MAX_RECORD_BYTES)
            end = lines.tell()
            if len(last) == MAX_RECORD_BYTES and end < size:
                raise _too_long_error(path, f"the line that byte {start:,} begins, or one after it,")
            yield Shard(input_index, path, start, end)
            start = end


def _compressed_line_shards(path: Path, input_index: int, start: int, shard_bytes: int) -> Iterator[Shard]:
    line, offset = 1, 0
    # A long line comes in many reads: appending to bytes would copy it each time, and it is searched once.
    buffer, searched = bytearray(), 0
    with open_bytes(path) as lines:
        while offset < start:
            skipped = lines.read(min(READ_BYTES, start - offset))
            if not skipped:
                raise DataError(f"{path} has become shorter since the interrupted run; give --overwrite")
            line += skipped.count(b"\n")
            offset += len(skipped)
        while True:
            more = lines.read(min(READ_BYTES, shard_bytes))
            buffer += more
            if len(buffer) < shard_bytes and more:
                continue
            cut = buffer.rfind(b"\n", searched) + 1 if more else len(buffer)
            if not cut and len(buffer) > MAX_RECORD_BYTES:
                raise _too_long_error(path, f"line {line}")
            if cut:
                yield Shard(input_index, path, offset, offset + cut, bytes(buffer[:cut]), line)
                line += buffer.count(b"\n", 0, cut)
                offset += cut
                del buffer[:cut]
            searched = len(buffer)
            if not more:
                return


def _record_shards(
    path: Path, input_index: int, start: int, shard_bytes: int, records: Iterator[tuple[Record, int]]
) -> Iterator[Shard]:
    """Group records into shards; each record comes with its size in bytes."""
    held: list[Record] = []
    size = number = 0
    first = start
    for number, (record, record_bytes) in enumerate(records, 1):
        if number <= start:
            continue
        held.append(record)
        size += record_bytes
        if size >= shard_bytes:
            yield Shard(input_index, path, first, number, held)
            first, held, size = number, [], 0
    if held:
        yield Shard(input_index, path, first, number, held)


def _begins_with_bracket(path: Path) -> bool:
    with open_bytes(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _json_records(path: Path) -> Iterator[tuple[Record, int]]:
    """Yield the objects of a JSON list and their sizes, without loading the whole list."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[\s,]*")
    with open_bytes(path) as file:
        text = _TextWindow(file)
        text.more()
        offset = text.buffer.index("[") + 1
        number = 0
        while True:
            offset = space.match(text.buffer, offset).end()  # type: ignore[union-attr]
            if offset < len(text.buffer) and text.buffer[offset] == "]":
                _check_nothing_follows(path, text, offset + 1)
                return
            try:
                value, end = decoder.raw_decode(text.buffer, offset)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(text.buffer) - 16 or error.msg.startswith("Unterminated")
                text.drop(offset)
                offset = 0
                if len(text.buffer) > MAX_RECORD_BYTES:
                    raise _too_long_error(path, f"record {number + 1}") from None
                if cut and text.more():
                    continue
                raise DataError(
                    f"{path}, record {number + 1}: not JSON: {error.msg}"
                    + (" (the file is incomplete)" if cut else "")
                ) from None
            except (RecursionError, ValueError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else error
                raise DataError(f"{path}, record {number + 1}: not JSON: {reason}") from None
            number += 1
            if not isinstance(value, dict):
                raise DataError(
                    f"{path}, record {number}: expected a JSON object, found {type(value).__name__}"
                )
            yield value, end - offset
            offset = end
            if offset > READ_BYTES:
                text.drop(offset)
                offset = 0


def _check_nothing_follows(path: Path, text: "_TextWindow", offset: int) -> None:
    """Raise `DataError` if something but space follows the end of a list."""
    text.drop(offset)
    while not text.buffer.strip():
        text.drop(len(text.buffer))
        if not text.more():
            return
    raise DataError(f"{path}: {text.buffer.strip()[:20]!r} follows the end of the list; repair the file")


class _TextWindow:
    """A window on the decoded text of a file."""

    def __init__(self, file: BinaryIO) -> None:
        import codecs

        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer = ""

    def more(self) -> bool:
        """Double the window; return `False` at the end of the file."""
        read = self._file.read(max(READ_BYTES, len(self.buffer)))
        self.buffer += self._decoder.decode(read, final=not read)
        return bool(read)

    def drop(self, count: int) -> None:
        """Drop the first characters."""
        self.buffer = self.buffer[count:]


def _csv_shards(path: Path, input_index: int, start: int, shard_bytes: int) -> Iterator[Shard]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    with open_bytes(path) as raw:
        reader = csv.DictReader(_csv_lines(path, raw), restkey="", strict=True)

        def records() -> Iterator[tuple[Record, int]]:
            try:
                for record in reader:
                    if "" in record and "" not in (reader.fieldnames or ()):
                        raise DataError(
                            f"{path}, line {reader.line_num}: the line has more values than the header has columns"
                        )
                    if None in record.values():
                        raise DataError(
                            f"{path}, line {reader.line_num}: the line has fewer values than the header has columns"
                        )
                    yield record, sum(len(value or "") for value in record.values())
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None

        yield from _record_shards(path, input_index, start, shard_bytes, records())


def _csv_lines(path: Path, raw: BinaryIO) -> Iterator[str]:
    buffered = raw if hasattr(raw, "readline") else io.BufferedReader(_RawReader(raw), READ_BYTES)
    for number, line in enumerate(iter(lambda: buffered.readline(MAX_RECORD_BYTES), b""), 1):
        if len(line) == MAX_RECORD_BYTES:
            raise _too_long_error(path, f"line {number}")
        if b"\0" in line:
            raise DataError(f"{path}, line {number}: contains a NUL byte, so it is not text; repair the file")
        yield line.decode("utf-8-sig" if number == 1 else "utf-8")


class _RawReader(io.RawIOBase):
    """Wrap an object that has only `read` as a raw file."""

    def __init__(self, file: BinaryIO) -> None:
        self._source = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._source.read(len(buffer))
        buffer[: len(read)] = read
        return len(read)


def _parquet_shards(
    path: Path, input_index: int, start: int, shard_bytes: int, columns: Sequence[str] | None
) -> Iterator[Shard]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as opened:
            names = set(opened.schema_arrow.names)
            wanted = [name for name in columns if name in names] if columns else None
            # Without any of the columns the records have all, so that an error can name them.
            unread = tuple(name for name in opened.schema_arrow.names if name not in wanted) if wanted else ()
            offset = 0
            for group in range(opened.num_row_groups):
                metadata = opened.metadata.row_group(group)
                if offset + metadata.num_rows <= start:
                    offset += metadata.num_rows
                    continue
                row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
                batches = opened.iter_batches(
                    batch_size=max(1, min(shard_bytes // row_bytes, 1 << 16)),
                    row_groups=[group],
                    columns=wanted or None,
                    use_threads=False,
                )
                for batch in batches:
                    batch.validate(full=True)
                    rest = batch.slice(max(0, start - offset))
                    if rest.num_rows:
                        end = offset + batch.num_rows
                        yield Shard(input_index, path, end - rest.num_rows, end, rest, unread_columns=unread)
                    offset += batch.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is damaged or not a Parquet file: {error}") from None


def _arrow_shards(path: Path, input_index: int, start: int) -> Iterator[Shard]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                opened = pyarrow.ipc.open_file(source)
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            offset = 0
            for batch in batches:
                batch.validate(full=True)
                for first in range(0, batch.num_rows, ARROW_ROWS_PER_SHARD):
                    part = batch.slice(first, ARROW_ROWS_PER_SHARD)
                    rest = part.slice(max(0, start - offset))
                    if rest.num_rows:
                        end = offset + part.num_rows
                        yield Shard(input_index, path, end - rest.num_rows, end, rest)
                    offset += part.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is damaged or not an Arrow file: {error}") from None


def _too_long_error(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what} is longer than {MAX_RECORD_BYTES >> 20} MiB, so the file is damaged or a decompression bomb; "
        "remove the file or split the document"
    )
