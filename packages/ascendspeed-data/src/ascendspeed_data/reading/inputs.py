"""Find and open input files."""

import glob
import gzip
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from ascendspeed_data.errors import ConfigError, DataError

TEXT_FORMATS = (".jsonl", ".json", ".csv", ".txt")
COLUMN_FORMATS = (".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Return the files of paths, folders and globs; files of a folder or glob are sorted by name.

    Raises:
        ConfigError: a file has an unsupported format.
        DataError: a pattern matches no file, or a folder cannot be read.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = [file for file in _files_below(path) if format_of(file)]
        else:
            matches = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(pattern))]  # noqa: PTH207 - absolute patterns
        if not matches:
            raise DataError(f"input {pattern} matches no supported file; check --input")
        found += matches
    for path in found:
        if format_of(path) is None:
            known = ", ".join((*TEXT_FORMATS, *COLUMN_FORMATS))
            raise ConfigError(
                f"input {path} has an unsupported format; supported are {known}, the first four also "
                f"with {' or '.join(COMPRESSIONS)}"
            )
    return found


def _files_below(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}; check its permissions") from None

    return sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder, onerror=fail, followlinks=True)
        for name in names
    )


def format_of(path: Path) -> str | None:
    """Return the format of a file, which is its suffix without that of a compression; `None` if unsupported."""
    compressed = path.suffix in COMPRESSIONS
    suffix = Path(path.stem).suffix if compressed else path.suffix
    known = TEXT_FORMATS if compressed else (*TEXT_FORMATS, *COLUMN_FORMATS)
    return suffix if suffix in known else None


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, so that offsets in its content are not offsets in the file."""
    return path.suffix in COMPRESSIONS


def open_bytes(path: Path) -> BinaryIO:
    """Open a file to read its decompressed content."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return cast(BinaryIO, _ZstandardFile(path))
    return path.open("rb")


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into a `DataError` that names the file."""
    import zlib

    import zstandard

    try:
        yield
    except (UnicodeDecodeError, EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be read: {error}; the file is damaged or incomplete") from None


class _ZstandardFile:
    """A `.zst` file with one or more frames; a file that ends inside a frame is an error."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._make: Callable[[], Any] = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._file = path.open("rb")
        self._frame: Any = None
        self._rest = b""
        self._ready = b""

    def read(self, size: int) -> bytes:
        """Return `size` bytes, or fewer at the end."""
        while len(self._ready) < size:
            compressed = self._rest or self._file.read(1 << 17)
            self._rest = b""
            if not compressed:
                if self._frame is not None:
                    raise EOFError("compressed file ended inside a frame")
                break
            if self._frame is None:
                self._frame = self._make()
            self._ready += self._frame.decompress(compressed)
            if self._frame.eof:
                self._rest = self._frame.unused_data
                self._frame = None
        taken, self._ready = self._ready[:size], self._ready[size:]
        return taken

    def __enter__(self) -> "_ZstandardFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
