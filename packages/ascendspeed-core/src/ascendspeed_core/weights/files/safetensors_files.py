"""The header of a safetensors file: where each tensor lies.

A little-endian uint64 (length of the header), the header (JSON: name -> dtype, shape, offsets in the data), the data.
"""

import json
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.weights.files.file_tensor import (
    StoredFile,
    StoredTensor,
    contiguous_stride,
    what_instead,
)
from ascendspeed_core.weights.source import CheckpointError, TensorInfo

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Formats of weights."""

_OTHER_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_QUANTISED = frozenset(("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"))
"""Formats that only quantised weights and their scales have."""
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a file by name; none is read.

    Raises:
        CheckpointError: the file is damaged or cut short.
    """
    file = StoredFile(path)
    try:
        return _tensors(file)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # What a header says may be wrong in any way; the file is what is wrong.
        why = what_instead(path) or f"{error}; copy it again"
        raise CheckpointError(f"{path} cannot be read: {why}") from None


def _tensors(file: StoredFile) -> dict[str, StoredTensor]:
    if file.size < _LENGTH_BYTES:
        raise ValueError(f"it has {file.size} bytes, too few for a safetensors file")
    length = int(file.read(0, _LENGTH_BYTES).view(torch.int64))
    begin = _LENGTH_BYTES + length
    if not 0 < length <= min(_MOST_HEADER_BYTES, file.size - _LENGTH_BYTES):
        raise ValueError(f"its header would have {length} bytes")
    header: dict[str, Any] = json.loads(file.read(_LENGTH_BYTES, length).numpy().tobytes())
    header.pop("__metadata__", None)
    ends = [0]
    found = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if entry["dtype"] in _QUANTISED:
            raise CheckpointError(
                f"{file.path}: {name} is stored as {entry['dtype']}, so the folder is quantised, which is not read; "
                "load the folder that it was made from, whose weights are not quantised"
            )
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"]) or _OTHER_DTYPES[entry["dtype"]]
        info = TensorInfo(tuple(entry["shape"]), dtype)
        if any(type(size) is not int or size < 0 for size in (*info.shape, start, end)):
            raise ValueError(f"{name} has shape {entry['shape']} and offsets {entry['data_offsets']}")
        if start != ends[-1] or end - start != info.num_bytes:
            raise ValueError(f"{name} of shape {entry['shape']} would lie at bytes {start} to {end}")
        ends.append(end)
        found[name] = StoredTensor(file, info, begin + start, contiguous_stride(info.shape))
    if begin + ends[-1] != file.size:
        raise ValueError(f"it has {file.size} bytes, its header speaks of {begin + ends[-1]}")
    return found
