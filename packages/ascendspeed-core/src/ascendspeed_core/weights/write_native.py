"""Write a native checkpoint of weights alone, tensor by tensor: no more than one tensor is in memory.

The files are those that torch's DCP writes from one process: blobs of `torch.save` one after the other, and a
pickled table of where each lies. DCP itself wants all tensors at once.
"""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core import __version__
from ascendspeed_core.weights.native import DESCRIPTION, FORMAT_VERSION, TRACKER
from ascendspeed_core.weights.source import WeightSource

DATA_FILE = "__0_0.distcp"


def write_native(
    source: WeightSource,
    folder: Path,
    dtype: torch.dtype | None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> None:
    """Write a run's folder that holds weights at iteration 0; training started from it begins its data anew.

    Args:
        source: the weights.
        folder: an existing folder.
        dtype: format of the written weights; by default the stored one.
        on_bytes: told how many bytes were written after each tensor.
    """
    place = folder / "iter_0000000"
    place.mkdir()
    places: dict[str, tuple[int, int]] = {}
    written = torch.float32
    with (place / DATA_FILE).open("wb") as file:
        for name, info in source.tensors().items():
            tensor = source.read(name)
            tensor = tensor.to(dtype or tensor.dtype).contiguous().clone()
            blob = io.BytesIO()
            torch.save(tensor, blob)
            places[f"model/{name}"] = (file.tell(), blob.tell())
            file.write(blob.getbuffer())
            written = tensor.dtype
            on_bytes(info.num_bytes)
    metadata = _metadata(source, written, places)
    (place / ".metadata").write_bytes(pickle.dumps(metadata))
    description = {
        "format_version": FORMAT_VERSION,
        "ascendspeed_core": __version__,
        "torch": torch.__version__,
        "iteration": 0,
        "consumed_samples": 0,
        "skipped_samples": 0,
        "optimizer_steps": 0,
        "data_order": {},
        "order_digest": "",
        "layout": {"tp": 1, "pp": 1, "dp": 1},
        "loss_scale": None,
        "dtype": str(written).removeprefix("torch."),
        "model": source.config.model_dump(mode="json"),
        "run": {},
    }
    (place / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    (folder / TRACKER).write_text("0\n", encoding="utf-8")


def _metadata(source: WeightSource, dtype: torch.dtype, places: dict[str, tuple[int, int]]) -> Any:
    """Return DCP's table of one whole chunk per tensor."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage = {}
    for name, info in source.tensors().items():
        key, size = f"model/{name}", torch.Size(info.shape)
        origin = torch.Size([0] * len(size))
        tensors[key] = TensorStorageMetadata(
            properties=TensorProperties(dtype=dtype), size=size, chunks=[ChunkStorageMetadata(origin, size)]
        )
        storage[MetadataIndex(key, origin, 0)] = _StorageInfo(DATA_FILE, *places[key])
    return Metadata(
        state_dict_metadata=tensors, planner_data={key: (key,) for key in tensors}, storage_data=storage
    )
