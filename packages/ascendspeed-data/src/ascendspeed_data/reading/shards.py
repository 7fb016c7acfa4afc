"""Cut inputs into shards: pieces of work of some megabytes that a worker reads, or is handed.

A shard begins and ends at a place of its file, a byte for lines and a record for everything else, so that a run that
was cut off can go on at any of them.
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

Record = dict[str, Any]

MAX_RECORD_BYTES = 1 << 27
"""A longer line or record is taken for a damaged file or a decompression bomb: it would not fit in memory."""

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Shard:
    """A piece of one input.

    Attributes:
        file: number of the input.
        path: of the input.
        start: first byte (of lines) or record (of everything else).
        end: the byte or record after the last one.
        content: lines that had to be decompressed, records, or a pyarrow batch; `None` if the worker reads the bytes
            from `start` to `end` of the file.
        first_line: number of the first line, for messages; 0 if nobody counted.
    """

    file: int
    path: Path
    start: int
    end: int
    content: bytes | list[Record] | Any = None
    first_line: int = 0


Reader = Callable[[Path, int, int, int], Iterator[Shard]]


def shards_of(
    path: Path, file: int, start: int, shard_bytes: int, columns: Sequence[str] | None = None
) -> Iterator[Shard]:
    """Cut one file from place `start` on.

    Args:
        path: the file.
        file: its number.
        start: byte or record to begin with.
        shard_bytes: how much goes into a shard, about.
        columns: what is needed of a file that stores columns apart; `None` for all.

    Raises:
        DataError: the file is damaged.
    """
    kind = format_of(path)
    with read_errors(path):
        if kind == ".parquet":
            yield from _parquet_shards(path, file, start, shard_bytes, columns)
        elif kind == ".arrow":
            yield from _arrow_shards(path, file, start)
        elif kind == ".csv":
            yield from _csv_shards(path, file, start, shard_bytes)
        elif kind == ".json" and _begins_with_bracket(path):
            yield from _record_shards(path, file, start, shard_bytes, _json_records(path))
        elif is_compressed(path):
            yield from _compressed_line_shards(path, file, start, shard_bytes)
        else:
            yield from _line_shards(path, file, start, shard_bytes)


def _line_shards(path: Path, file: int, start: int, shard_bytes: int) -> Iterator[Shard]:
    size = path.stat().st_size
    with path.open("rb") as lines:
        while start < size:
            lines.seek(min(start + shard_bytes, size) - 1)
            last = lines.readline(MAX_RECORD_BYTES)
            end = lines.tell()
            if len(last) == MAX_RECORD_BYTES and end < size:
                raise _too_long(path, f"the line that byte {start:,} begins, or one after it,")
            yield Shard(file, path, start, end)
            start = end


def _compressed_line_shards(path: Path, file: int, start: int, shard_bytes: int) -> Iterator[Shard]:
    line, place, buffer = 1, 0, b""
    with open_bytes(path) as lines:
        while place < start:
            skipped = lines.read(min(READ_BYTES, start - place))
            if not skipped:
                raise DataError(f"{path} is shorter than it was; it was changed since the run was cut off")
            line += skipped.count(b"\n")
            place += len(skipped)
        while True:
            more = lines.read(min(READ_BYTES, shard_bytes))
            buffer += more
            if len(buffer) < shard_bytes and more:
                continue
            cut = buffer.rfind(b"\n") + 1 if more else len(buffer)
            if not cut and len(buffer) > MAX_RECORD_BYTES:
                raise _too_long(path, f"line {line}")
            if cut:
                yield Shard(file, path, place, place + cut, buffer[:cut], line)
                line += buffer.count(b"\n", 0, cut)
                place, buffer = place + cut, buffer[cut:]
            if not more:
                return


def _record_shards(
    path: Path, file: int, start: int, shard_bytes: int, records: Iterator[tuple[Record, int]]
) -> Iterator[Shard]:
    """Collect records, given with their sizes in bytes, into shards."""
    held: list[Record] = []
    size = number = 0
    first = start
    for number, (record, record_bytes) in enumerate(records, 1):
        if number <= start:
            continue
        held.append(record)
        size += record_bytes
        if size >= shard_bytes:
            yield Shard(file, path, first, number, held)
            first, held, size = number, [], 0
    if held:
        yield Shard(file, path, first, number, held)


def _begins_with_bracket(path: Path) -> bool:
    with open_bytes(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _json_records(path: Path) -> Iterator[tuple[Record, int]]:
    """Yield the objects of one JSON list without holding the list."""
    decoder = json.JSONDecoder()
    space = re.compile(r"[\s,]*")
    with open_bytes(path) as file:
        text = _Text(file)
        text.more()
        place = text.buffer.index("[") + 1
        number = 0
        while True:
            place = space.match(text.buffer, place).end()  # type: ignore[union-attr]
            if place < len(text.buffer) and text.buffer[place] == "]":
                return
            try:
                value, end = decoder.raw_decode(text.buffer, place)
            except json.JSONDecodeError as error:
                cut = error.pos >= len(text.buffer) - 16 or error.msg.startswith("Unterminated")
                text.drop(place)
                place = 0
                if len(text.buffer) > MAX_RECORD_BYTES:
                    raise _too_long(path, f"record {number + 1}") from None
                if cut and text.more():
                    continue
                raise DataError(
                    f"{path}, record {number + 1}: not JSON: {error.msg}"
                    + (" (the file ends)" if cut else "")
                ) from None
            number += 1
            if not isinstance(value, dict):
                raise DataError(
                    f"{path}, record {number}: not an object with columns but {type(value).__name__}"
                )
            yield value, end - place
            place = end
            if place > READ_BYTES:
                text.drop(place)
                place = 0


class _Text:
    """Decoded text of a file, of which a window is held."""

    def __init__(self, file: BinaryIO) -> None:
        import codecs

        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer = ""

    def more(self) -> bool:
        """Read on, as much as is held already; `False` at the end."""
        read = self._file.read(max(READ_BYTES, len(self.buffer)))
        self.buffer += self._decoder.decode(read, final=not read)
        return bool(read)

    def drop(self, count: int) -> None:
        """Forget the first characters."""
        self.buffer = self.buffer[count:]


def _csv_shards(path: Path, file: int, start: int, shard_bytes: int) -> Iterator[Shard]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    with open_bytes(path) as raw:
        reader = csv.DictReader(_csv_lines(path, raw), restkey="", strict=True)

        def records() -> Iterator[tuple[Record, int]]:
            try:
                for record in reader:
                    if "" in record and "" not in (reader.fieldnames or ()):
                        raise DataError(
                            f"{path}, line {reader.line_num}: more values than the header has columns"
                        )
                    yield record, sum(len(value or "") for value in record.values())
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}") from None

        yield from _record_shards(path, file, start, shard_bytes, records())


def _csv_lines(path: Path, raw: BinaryIO) -> Iterator[str]:
    buffered = raw if hasattr(raw, "readline") else io.BufferedReader(_Raw(raw), READ_BYTES)
    for number, line in enumerate(iter(lambda: buffered.readline(MAX_RECORD_BYTES), b""), 1):
        if len(line) == MAX_RECORD_BYTES:
            raise _too_long(path, f"line {number}")
        if b"\0" in line:
            raise DataError(f"{path}, line {number}: holds a NUL byte, so it is no text; repair the file")
        yield line.decode("utf-8-sig" if number == 1 else "utf-8")


class _Raw(io.RawIOBase):
    """Give an object that has only `read` the methods of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._source = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        read = self._source.read(len(buffer))
        buffer[: len(read)] = read
        return len(read)


def _parquet_shards(
    path: Path, file: int, start: int, shard_bytes: int, columns: Sequence[str] | None
) -> Iterator[Shard]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as opened:
            names = set(opened.schema_arrow.names)
            wanted = [name for name in columns if name in names] if columns else None
            place = 0
            for group in range(opened.num_row_groups):
                metadata = opened.metadata.row_group(group)
                if place + metadata.num_rows <= start:
                    place += metadata.num_rows
                    continue
                row_bytes = max(1, metadata.total_byte_size // max(1, metadata.num_rows))
                batches = opened.iter_batches(
                    batch_size=max(1, min(shard_bytes // row_bytes, 1 << 16)),
                    row_groups=[group],
                    columns=wanted or None,
                    use_threads=False,
                )
                for batch in batches:
                    rest = batch.slice(max(0, start - place))
                    if rest.num_rows:
                        end = place + batch.num_rows
                        yield Shard(file, path, end - rest.num_rows, end, rest)
                    place += batch.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a whole Parquet file: {error}") from None


def _arrow_shards(path: Path, file: int, start: int) -> Iterator[Shard]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            try:
                batches: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                opened = pyarrow.ipc.open_file(source)
                batches = (opened.get_batch(number) for number in range(opened.num_record_batches))
            place = 0
            for batch in batches:
                for offset in range(0, batch.num_rows, 1000):
                    piece = batch.slice(offset, 1000)
                    rest = piece.slice(max(0, start - place))
                    if rest.num_rows:
                        end = place + piece.num_rows
                        yield Shard(file, path, end - rest.num_rows, end, rest)
                    place += piece.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a whole Arrow file: {error}") from None


def _too_long(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what} is longer than {MAX_RECORD_BYTES >> 20} MiB, which no document is: a damaged file or a "
        "decompression bomb; remove it, or cut the document"
    )
