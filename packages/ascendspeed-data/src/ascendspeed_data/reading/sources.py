"""Where records come from: files, or whatever `datasets.load_dataset` opens."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from ascendspeed_data.errors import ConfigError, DataError
from ascendspeed_data.reading.inputs import format_of, sha256_of
from ascendspeed_data.reading.records import no_record
from ascendspeed_data.reading.shards import Record, Shard, shards_of


@dataclass(frozen=True)
class InputFile:
    """What a manifest says of one input."""

    name: str
    num_bytes: int
    sha256: str


class Source(Protocol):
    """One input of a run."""

    def identity(self) -> list[Any]:
        """Return what tells whether the input is still the same; the name comes first."""
        ...

    def shards(self, number: int, start: int, shard_bytes: int) -> Iterator[Shard]:
        """Cut it from place `start` on."""
        ...

    def describe(self) -> list[InputFile]:
        """Hash it."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A file.

    Attributes:
        path: of the file.
        columns: needed columns, `None` for all.
    """

    path: Path
    columns: Sequence[str] | None = None

    def identity(self) -> list[Any]:
        """Return name, size and time of change."""
        stat = self.path.stat()
        return [str(self.path), stat.st_size, stat.st_mtime_ns]

    def shards(self, number: int, start: int, shard_bytes: int) -> Iterator[Shard]:
        """Cut the file from place `start` on; a file without records is an error."""
        empty = start == 0
        for shard in shards_of(self.path, number, start, shard_bytes, self.columns):
            empty = False
            yield shard
        if empty:
            raise no_record(self.path)

    def describe(self) -> list[InputFile]:
        """Hash the file."""
        return [InputFile(self.path.name, self.path.stat().st_size, sha256_of(self.path))]


class DatasetsSource:
    """What `datasets.load_dataset` opens with the arguments in a JSON file.

    Args:
        params_file: the JSON file.
        streaming: stream even if the file does not say so.
    """

    def __init__(self, params_file: Path, streaming: bool) -> None:
        self.path = params_file
        self.params = _read_params(params_file)
        if streaming:
            self.params["streaming"] = True
        self.params.setdefault("split", "train")

    def identity(self) -> list[Any]:
        """Return the arguments, and size and time of change of every file below a local folder."""
        files = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self._files()]
        return [str(self.path), self.params, files]

    def shards(self, number: int, start: int, shard_bytes: int) -> Iterator[Shard]:
        """Read records from number `start` on."""
        records = self._open(start)
        try:
            yield from self._collect(records, number, start, shard_bytes)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._complaint(error) from None

    def _collect(
        self, records: Iterator[Record], number: int, start: int, shard_bytes: int
    ) -> Iterator[Shard]:
        held: list[Record] = []
        size, place = 0, start
        for record in records:
            held.append(record)
            size += sum(len(value) if isinstance(value, str) else 8 for value in record.values())
            if size >= shard_bytes:
                yield Shard(number, self.path, place, place + len(held), held)
                place, held, size = place + len(held), [], 0
        if held:
            yield Shard(number, self.path, place, place + len(held), held)
        if place + len(held) == 0:
            raise no_record(self.path)

    def describe(self) -> list[InputFile]:
        """Hash the files below a local folder; for anything else, the arguments."""
        files = [InputFile(file.name, file.stat().st_size, sha256_of(file)) for file in self._files()]
        content = json.dumps(self.params, sort_keys=True).encode()
        return [
            InputFile(f"load_dataset({content.decode()})", 0, hashlib.sha256(content).hexdigest()),
            *files,
        ]

    def _files(self) -> list[Path]:
        folder = Path(str(self.params["path"]))
        files = sorted(folder.rglob("*")) if folder.is_dir() else []
        return [file for file in files if file.is_file() and format_of(file)]

    def _open(self, start: int) -> Iterator[Record]:
        # The library imports torch where it is installed, which costs seconds and is of no use here.
        os.environ.setdefault("USE_TORCH", "0")
        try:
            import datasets
        except ImportError:
            raise DataError(
                "--hf-datasets-params needs the package datasets: pip install 'ascendspeed-data[datasets]'"
            ) from None
        datasets.disable_progress_bars()
        try:
            opened = datasets.load_dataset(**self.params)
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise self._complaint(error) from None
        if isinstance(opened, dict):
            raise ConfigError(f"{self.path}: split names no single split; there are {', '.join(opened)}")
        return iter(opened.skip(start) if start else opened)

    def _complaint(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(f"{self.path}: load_dataset failed: {type(error).__name__}: {reason[:400]}")


def _read_params(path: Path) -> dict[str, Any]:
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"hf_datasets_params={path} cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"hf_datasets_params={path} is not JSON: {error} (names stand between two quotes, true is lower case)"
        ) from None
    if not isinstance(params, dict) or "path" not in params:
        raise DataError(
            f"hf_datasets_params={path} is no object with 'path', as datasets.load_dataset takes it"
        )
    if params.get("trust_remote_code"):
        raise DataError(f"hf_datasets_params={path} asks to run code of a dataset, which is never done")
    return params


def first_records(sources: Sequence[Source], shard_bytes: int) -> Iterator[Shard]:
    """Yield shards from the beginning of the first input, to look at."""
    return chain.from_iterable(source.shards(0, 0, shard_bytes) for source in sources[:1])
