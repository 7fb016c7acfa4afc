"""Read what `torch.save` wrote without running a line of it, and without reading the tensors.

A `.pt` file is a zip archive: `NAME/data.pkl`, a pickle whose tensors say only which storage they look at, and one
uncompressed record `NAME/data/KEY` for each storage. The pickle is read by an allow-list; classes are replaced by
our own, so that none of its code is ever called: objects of arguments become inert ones, which matters only where
someone asks for them; functions of the standard library that a file asks for are refused, and with them the file.
Storages stay where they are until a slice of one is asked for.
"""

import pickle
import struct
import sys
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.weights.files.file_tensor import BUFFER_BYTES, StoredFile, StoredTensor, what_instead
from ascendspeed_core.weights.source import CheckpointError, TensorInfo

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
"""Names under which pickles speak of storages."""

INERT_PACKAGES = (
    "ascendspeed",
    "megatron",
    "deepspeed",
    "modellink",
    "mindspeed",
    "transformer_engine",
    "numpy",
)
"""Packages whose objects lie beside weights (arguments, random states); they become `InertObject`s."""

STANDARD_DATA = frozenset(
    (
        "pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath", "pathlib.Path",
        "pathlib._local.PosixPath", "pathlib._local.PurePosixPath", "pathlib._local.WindowsPath",
        "pathlib._local.PureWindowsPath", "pathlib._local.Path", "_io.BytesIO", "io.BytesIO", "_io.StringIO",
        "collections.defaultdict", "collections.deque", "collections.Counter", "types.SimpleNamespace",
        "datetime.datetime", "datetime.timedelta", "datetime.date", "datetime.timezone", "decimal.Decimal", "uuid.UUID",
        "functools.partial", "builtins.object", "builtins.complex", "builtins.frozenset", "builtins.slice",
        "builtins.range", "builtins.int", "builtins.float", "builtins.str", "builtins.bool", "builtins.list",
        "builtins.dict", "builtins.tuple", "copyreg._reconstructor", "copy_reg._reconstructor",
    )
)  # fmt: skip
"""What arguments of the standard library hold; they become `InertObject`s. Everything else of it is refused."""

_LOCAL_HEADER_BYTES = 30


class InertObject:
    """Stands for an object of another package: the name of its class and its arguments, no behaviour."""

    arguments: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items = [*getattr(self, "items", []), (key, value)]

    def __call__(self, *arguments: Any) -> "InertObject":
        """Stand for what a method of the class would have made."""
        return type(self)(*arguments)

    def append(self, value: Any) -> None:
        """Take an element, as lists do."""
        self.__setitem__(None, value)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.arguments}"


class UnknownObject(InertObject):
    """Stands for an object of a package that is not known; what it would be is not found out."""


class TorchFile:
    """One `.pt` file, or one archive inside a larger file.

    Args:
        path: the file.
        start: first byte of the archive.
        length: bytes of the archive; the rest of the file by default.

    Raises:
        CheckpointError: damaged, cut short, or asking for a class that no checkpoint needs.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        self.path = path
        try:
            self._file = StoredFile(path)
            with path.open("rb") as file:
                part = _FileWindow(file, start, length if length is not None else self._file.size - start)
                with zipfile.ZipFile(part) as archive:
                    self._records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                    if "data.pkl" not in self._records:
                        raise zipfile.BadZipFile("it holds no data.pkl")
                    pickled = archive.read(self._records["data.pkl"])
                self._starts = {
                    name: start + _data_start(part, info)
                    for name, info in self._records.items()
                    if name.startswith("data/")
                }
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        except Exception as error:  # noqa: BLE001 - a zip file can be wrong in any way; the file is what is wrong
            other = what_instead(path)
            raise CheckpointError(
                f"{path} cannot be read: {other}"
                if other is not None
                else f"{path} is damaged or no file of torch.save (torch 1.6 or later): {error}; copy it again"
            ) from None
        self.content: Any = unpickle(pickled, path, self._stored)

    def check(self) -> None:
        """Compare every record with its checksum.

        Raises:
            CheckpointError: one differs.
        """
        buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        for name, start in self._starts.items():
            record, checksum = self._records[name], 0
            with self._file.opened() as file:
                for first in range(start, start + record.file_size, BUFFER_BYTES):
                    part = buffer[: min(BUFFER_BYTES, start + record.file_size - first)]
                    self._file.read_into(file, part, first)
                    checksum = zlib.crc32(part.numpy().data, checksum)
            if checksum != record.CRC:
                raise CheckpointError(
                    f"{self.path} is damaged: the checksum of {name} is wrong; copy it again"
                )

    def checksums(self) -> dict[str, int]:
        """Return what the archive says of its storages: CRC-32 by name."""
        return {name: self._records[name].CRC for name in self._starts}

    def _stored(
        self, key: str, dtype: torch.dtype, numel: int, offset: int, shape: Any, stride: Any
    ) -> StoredTensor:
        record = self._records.get(f"data/{key}")
        if record is None:
            raise CheckpointError(f"{self.path} lacks the storage {key}; copy it again")
        if record.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{self.path}: storage {key} is compressed, which torch.save never does")
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        sizes_fit = all(length >= 0 for length in shape) and all(step >= 0 for step in stride) and offset >= 0
        if not sizes_fit or (0 not in shape and (last + 1) * dtype.itemsize > record.file_size):
            raise CheckpointError(
                f"{self.path}: a tensor of shape {list(shape)} reaches beyond its storage {key}"
            )
        if numel * dtype.itemsize > record.file_size:
            raise CheckpointError(f"{self.path} is cut short at storage {key}; copy it again")
        start = self._starts[f"data/{key}"] + offset * dtype.itemsize
        return StoredTensor(self._file, TensorInfo(tuple(shape), dtype), start, tuple(stride))


def stored_tensors(content: Any, prefix: str = "") -> Iterator[tuple[str, StoredTensor]]:
    """Yield all tensors of nested dictionaries, names joined by dots."""
    if isinstance(content, StoredTensor):
        yield prefix, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from stored_tensors(value, f"{prefix}.{key}" if prefix else str(key))


def unpickle(pickled: bytes, path: Path, stored: Any) -> Any:
    """Read a pickle by the allow-list.

    Args:
        pickled: its bytes.
        path: for messages.
        stored: makes a `StoredTensor` of storage key, format, elements, offset, shape and stride.

    Raises:
        CheckpointError: it asks for another class, or is damaged.
    """
    import io

    try:
        return _Unpickler(io.BytesIO(pickled), path, stored).load()
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - a pickle can be wrong in any way; the file is what is wrong
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}; copy it again") from None


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


class _Unpickler(pickle.Unpickler):
    """An unpickler that gives plain data only."""

    def __init__(self, file: Any, path: Path, stored: Any) -> None:
        super().__init__(file, encoding="latin1")
        self._path = path
        self._allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            # A class of its own: a pickle may set attributes of classes.
            ("argparse", "Namespace"): type("Namespace", (Namespace,), {}),
            **{
                (module, kept.__name__): kept
                for module in ("builtins", "__builtin__")
                for kept in (set, bytearray)
            },
            ("builtins", "getattr"): self._member,
            ("__builtin__", "getattr"): self._member,
            ("_codecs", "encode"): _encode,
            ("torch", "Size"): tuple,
            ("torch", "device"): InertObject,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, stride, *_: stored(
                storage.key, storage.dtype, storage.numel, offset, shape, stride
            ),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        for name, dtype in STORAGE_DTYPES.items():
            self._allowed["torch", name] = dtype
            self._allowed["torch", str(dtype).removeprefix("torch.")] = dtype

    def find_class(self, module: str, name: str) -> Any:
        """Return what an allowed class becomes, or refuse it."""
        if (module, name) in self._allowed:
            return self._allowed[module, name]
        short = name.rpartition(".")[2]
        if module.partition(".")[0] in INERT_PACKAGES or f"{module}.{name}" in STANDARD_DATA:
            return type(short, (InertObject,), {"__module__": module})
        if _is_standard(module):
            raise self._refusal(f"{module}.{name}")
        return type(short, (UnknownObject,), {"__module__": module})

    def _member(self, owner: Any, name: Any) -> InertObject:
        """Members of enumerations are pickled as attributes of their class."""
        if not (isinstance(owner, type) and issubclass(owner, InertObject)) or _is_standard(owner.__module__):
            raise self._refusal(f"attribute {name} of {owner!r}")
        return owner(name)

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path} asks for {what}, which no checkpoint needs; refused, nothing of it was run"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Take note of a storage."""
        kind, dtype, key, _, numel = pid
        if kind == "storage" and isinstance(dtype, type) and issubclass(dtype, InertObject):
            raise CheckpointError(
                f"{self._path} holds tensors of {dtype.__module__}.{dtype.__name__}, a format that is not one of "
                "weights; quantised weights are not read, use the folder that they were made from"
            )
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{self._path} refers to {kind!r} outside of itself; refused")
        return _Storage(str(key), dtype, int(numel))


def _is_standard(module: str) -> bool:
    """Tell whether a module belongs to Python itself, of version 2 too."""
    return module.partition(".")[0] in {*sys.stdlib_module_names, "__builtin__", "copy_reg"}


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Protocol 2 writes bytes as text and how to encode it."""
    return text.encode("latin1" if encoding == "latin1" else "utf-8")


class _FileWindow:
    """Part of a file as a file of its own, for `zipfile`, which reads only."""

    def __init__(self, file: Any, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        position = offset + (0, self._position, self._length)[whence]
        if position < 0:
            raise OSError("it is shorter than its table of contents")
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._position, 0)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._position)
        data: bytes = self._file.read(size)
        self._position += len(data)
        return data


def _data_start(file: _FileWindow, info: zipfile.ZipInfo) -> int:
    """Return where a record's data begins: behind its local header, whose name and extra field vary in length."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    start = info.header_offset + _LOCAL_HEADER_BYTES + int(name_length) + int(extra_length)
    if start + info.file_size > file.seek(0, 2):
        raise zipfile.BadZipFile(f"record {info.filename} is cut short")
    return start
