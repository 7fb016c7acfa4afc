"""Sources of records: files, or a dataset of `datasets.load_dataset`."""

import glob
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
from ascendspeed_data.reading.nested import without_null_keys
from ascendspeed_data.reading.records import no_record_error
from ascendspeed_data.reading.shards import Shard, shards_of_file
from ascendspeed_data.sample import Record
from ascendspeed_data.small_files import JsonObject, read_json


@dataclass(frozen=True)
class InputFile:
    """Name, size and hash of an input, for the manifest."""

    name: str
    num_bytes: int
    sha256: str


class Source(Protocol):
    """One input of a run."""

    def identity(self) -> list[Any]:
        """Return the name, and values that change when the input changes."""
        ...

    def shards(self, number: int, start: int, shard_bytes: int) -> Iterator[Shard]:
        """Yield the shards of the input from offset `start`."""
        ...

    def describe(self) -> list[InputFile]:
        """Return name, size and hash of each file."""
        ...


@dataclass(frozen=True)
class FileSource:
    """A file.

    Attributes:
        path: path of the file.
        columns: columns to read, `None` for all.
    """

    path: Path
    columns: Sequence[str] | None = None

    def identity(self) -> list[Any]:
        """Return name, size and modification time."""
        stat = self.path.stat()
        return [str(self.path), stat.st_size, stat.st_mtime_ns]

    def shards(self, number: int, start: int, shard_bytes: int) -> Iterator[Shard]:
        """Yield the shards of the file from offset `start`; a file without records is an error."""
        empty = start == 0
        for shard in shards_of_file(self.path, number, start, shard_bytes, self.columns):
            empty = False
            yield shard
        if empty:
            raise no_record_error(self.path)

    def describe(self) -> list[InputFile]:
        """Return name, size and hash of the file."""
        return [InputFile(self.path.name, self.path.stat().st_size, sha256_of(self.path))]


class DatasetsSource:
    """A dataset of `datasets.load_dataset`, with arguments from a JSON file.

    Args:
        params_file: the JSON file.
        streaming: stream the dataset, whatever the file says.
    """

    def __init__(self, params_file: Path, streaming: bool) -> None:
        self.path = params_file
        self.params = _read_params(params_file)
        if streaming:
            self.params["streaming"] = True
        self.params.setdefault("split", "train")

    def identity(self) -> list[Any]:
        """Return the arguments; of local files also size and modification time."""
        files = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in self._files()]
        return [str(self.path), self.params, files]

    def shards(self, number: int, start: int, shard_bytes: int) -> Iterator[Shard]:
        """Yield shards from record `start`."""
        records = self._open(start)
        try:
            yield from self._collect(records, number, start, shard_bytes)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._load_error(error) from None

    def _collect(
        self, records: Iterator[Record], number: int, start: int, shard_bytes: int
    ) -> Iterator[Shard]:
        held: list[Record] = []
        size, offset = 0, start
        for loaded in records:
            # datasets keeps records in Arrow, which adds null keys to nested objects.
            record = {column: without_null_keys(value) for column, value in loaded.items()}
            held.append(record)
            size += sum(len(value) if isinstance(value, str) else 8 for value in record.values())
            if size >= shard_bytes:
                yield Shard(number, self.path, offset, offset + len(held), held)
                offset, held, size = offset + len(held), [], 0
        if held:
            yield Shard(number, self.path, offset, offset + len(held), held)
        if offset + len(held) == 0:
            raise no_record_error(self.path)

    def describe(self) -> list[InputFile]:
        """Return the hash of the arguments, and of local files."""
        files = [InputFile(file.name, file.stat().st_size, sha256_of(file)) for file in self._files()]
        content = json.dumps(self.params, sort_keys=True).encode()
        return [
            InputFile(f"load_dataset({content.decode()})", 0, hashlib.sha256(content).hexdigest()),
            *files,
        ]

    def _files(self) -> list[Path]:
        """Return the local files that the arguments name: those of a folder, of `data_dir`, of `data_files`."""
        folder, inner = Path(str(self.params["path"])), str(self.params.get("data_dir") or "")
        found = {
            file
            for named in {folder, Path(inner)} - {Path()}
            if named.is_dir()
            for file in named.rglob("*")
            if format_of(file)
        }
        for name in _texts_in(self.params.get("data_files")):
            for parent in (folder / inner, folder, Path(inner), Path()):
                found |= {Path(path) for path in glob.glob(str(parent / name), recursive=True)}  # noqa: PTH207 - absolute patterns
        return sorted(file for file in found if file.is_file())

    def _open(self, start: int) -> Iterator[Record]:
        # datasets would import torch if it is installed, which takes seconds and is not needed.
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
            raise self._load_error(error) from None
        if isinstance(opened, dict):
            raise ConfigError(f"{self.path}: split must name one split; choose from {', '.join(opened)}")
        return iter(opened.skip(start) if start else opened)

    def _load_error(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split())
        return DataError(f"{self.path}: load_dataset failed: {type(error).__name__}: {reason[:400]}")


def _texts_in(value: Any) -> list[str]:
    """Return all texts inside lists and objects."""
    if isinstance(value, dict | list | tuple):
        inner = value.values() if isinstance(value, dict) else value
        return [text for part in inner for text in _texts_in(part)]
    return [value] if isinstance(value, str) else []


def _read_params(path: Path) -> dict[str, Any]:
    remedy = "write names in double quotes, and true in lower case"
    params = read_json(path, JsonObject, f"hf_datasets_params={path}", remedy, option="--hf-datasets-params")
    if not isinstance(params.get("path"), str):
        raise DataError(
            f"hf_datasets_params={path} is not a JSON object with the key 'path', which datasets.load_dataset needs"
        )
    if params.get("trust_remote_code"):
        raise DataError(
            f"hf_datasets_params={path} has trust_remote_code, but code of a dataset never runs; remove it"
        )
    return params


def first_shards(sources: Sequence[Source], shard_bytes: int) -> Iterator[Shard]:
    """Yield shards from the start of the first input."""
    return chain.from_iterable(source.shards(0, 0, shard_bytes) for source in sources[:1])
