"""Write files that `torch.load` reads, slab by slab.

`torch.save` needs every tensor of a file in memory. Here the pickle holds a `TensorInfo` for each tensor, and the bytes
follow as they are read.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ascendspeed_core.weights.files.torch_files import STORAGE_DTYPES
from ascendspeed_core.weights.source import TensorInfo

ALIGNMENT = 64
"""torch puts storages at multiples of this."""

_STORAGE_CLASSES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
_LOCAL_HEADER_BYTES = 30
_ZIP64_BYTES = 20


class TorchArchive:
    """One archive of `torch.save`'s format, written from its start to its end.

    Args:
        file: open for writing; the archive begins where it stands.
        content: nested dictionaries with `TensorInfo`s in place of tensors, or one `TensorInfo`.

    It is a context manager. Tensors must be written in the order in which `content` names them: `begin_tensor`, then
    `write` as often as needed.
    """

    def __init__(self, file: BinaryIO, content: Any) -> None:
        self._file = _OffsetFile(file)
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        self._record: Any = None
        self._next = 0
        self.checksums: list[int] = []
        self._info: zipfile.ZipInfo | None = None
        with self._given_up_after_errors():
            self._put("data.pkl", _pickle(content))
            self._put("byteorder", b"little")
            self._put("version", b"3\n")

    def begin_tensor(self, info: TensorInfo) -> None:
        """Begin the next tensor."""
        self._end_tensor()
        self._info = self._entry(f"data/{self._next}", info.num_bytes)
        self._record = self._zip.open(self._info, "w", force_zip64=info.num_bytes >= 1 << 31)
        self._next += 1

    def write(self, data: memoryview) -> None:
        """Append bytes to the tensor that was begun."""
        self._record.write(data)

    def __enter__(self) -> "TorchArchive":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the archive, or give it up after an error; the file stays open."""
        if kind is not None:
            self._give_up()
            return
        with self._given_up_after_errors():
            self._end_tensor()
            self._zip.close()

    @contextmanager
    def _given_up_after_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        # Half an archive is of no use, and `zipfile` would try to end it and its record, and complain, when they are
        # collected.
        if self._record is not None:
            io.BufferedIOBase.close(self._record)
        self._zip.fp = None

    def _end_tensor(self) -> None:
        if self._record is not None:
            self._record.close()
            assert self._info is not None
            self.checksums.append(self._info.CRC)
            self._record = None

    def _put(self, name: str, data: bytes) -> None:
        self._zip.writestr(self._entry(name, len(data)), data)

    def _entry(self, name: str, size: int) -> zipfile.ZipInfo:
        info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
        info.file_size = size
        header = _LOCAL_HEADER_BYTES + len(info.filename) + 4 + (_ZIP64_BYTES if size >= 1 << 31 else 0)
        padding = -(self._file.tell() + header) % ALIGNMENT
        # An extra field of torch's own kind: "FB", length, filling.
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        return info


class _OffsetFile:
    """A file that begins at the current position of another, for `zipfile`, which writes only."""

    mode = "wb"

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._start = file, file.tell()

    def read(self, size: int = -1) -> bytes:
        raise OSError("it is open for writing only")

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Leave the file open."""

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + self._start if whence == 0 else offset, whence) - self._start

    def write(self, data: Any) -> int:
        # Unbuffered files may take less than they are given.
        view, written = memoryview(data), 0
        while written < len(view):
            written += self._file.write(view[written:])
        return written

    def flush(self) -> None:
        self._file.flush()


@dataclass(frozen=True)
class _StorageReference:
    """What a pickle says of a storage."""

    key: str
    info: TensorInfo


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=2)
        self._count = 0

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, TensorInfo):
            return NotImplemented
        strides, step = [], 1
        for length in reversed(value.shape):
            strides.append(step)
            step *= length
        storage = _StorageReference(str(self._count), value)
        self._count += 1
        arguments: tuple[Any, ...] = (storage, 0, value.shape, tuple(reversed(strides)), False, OrderedDict())
        return (torch._utils._rebuild_tensor_v2, arguments)

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _StorageReference):
            return None
        numel = value.info.num_bytes // value.info.dtype.itemsize
        return ("storage", getattr(torch, _STORAGE_CLASSES[value.info.dtype]), value.key, "cpu", numel)


def _pickle(content: Any) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream).dump(content)
    return stream.getvalue()
