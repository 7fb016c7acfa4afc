"""Write a Hugging Face folder, slab by slab: memory does not grow with the model.

Sizes are known before anything is read, so the header of a safetensors file can be written first, and several workers
can write one file.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ascendspeed_ckpt.threads import ByteCounter, OnBytes, run_in_threads
from ascendspeed_ckpt.writers.huggingface_view import HuggingFaceView
from ascendspeed_core.models.families import find_family
from ascendspeed_core.models.families.config_rules import written_end_ids
from ascendspeed_core.weights.files.safetensors_files import SAFETENSORS_DTYPES
from ascendspeed_core.weights.files.torch_archive import TorchArchive
from ascendspeed_core.weights.source import TensorInfo, WeightSource
from ascendspeed_core.weights.stream import as_bytes, slabs, write_all

RUN_BYTES = 256 << 20
"""About as many bytes of a safetensors file are written by one worker while others write the rest."""

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class _Planned:
    """One tensor to be written."""

    theirs: str
    info: TensorInfo


def write_hugging_face(
    source: WeightSource,
    folder: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    on_bytes: OnBytes = lambda _: None,
    workers: int = 1,
    pickled: bool = False,
) -> None:
    """Write weights and configs into an existing folder.

    Args:
        source: the weights.
        folder: where; files of the same names are replaced.
        dtype: of the written weights; by default the stored one.
        max_shard_bytes: weights in one file, unless a single tensor is larger.
        on_bytes: called with the number of bytes just written.
        workers: files, or parts of them, written at once.
        pickled: `pytorch_model*.bin` instead of safetensors, for old programs.
    """
    weights = HuggingFaceView(source)
    shards = plan_shards(weights, dtype, max_shard_bytes)
    names = shard_names(len(shards), pickled)
    count = ByteCounter(on_bytes)
    tasks: list[Callable[[], None]] = []
    for name, shard in zip(names, shards, strict=True):
        if pickled:
            tasks.append(partial(_write_pickled, weights, folder / name, shard, count))
        else:
            start = _write_header(folder / name, shard)
            tasks += [
                partial(_write_run, weights, folder / name, run, start + offset, count)
                for offset, run in _runs(shard)
            ]
    run_in_threads(tasks, workers)
    if len(shards) > 1:
        weight_map = {p.theirs: name for name, shard in zip(names, shards, strict=True) for p in shard}
        total = sum(planned.info.num_bytes for shard in shards for planned in shard)
        _write_json(
            folder / ("pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"),
            {"metadata": {"total_size": total}, "weight_map": weight_map},
        )
    first = shards[0][0].info.dtype
    config = find_family(source.config.family).write_config(source.config)
    _write_json(folder / "config.json", config | {"dtype": str(first).removeprefix("torch.")})
    generation = {
        "bos_token_id": source.config.bos_token_id,
        "eos_token_id": written_end_ids(source.config),
    }
    _write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})


def plan_shards(
    weights: HuggingFaceView, dtype: torch.dtype | None, max_shard_bytes: int
) -> list[list[_Planned]]:
    """Return which tensors go into which file, in the order of the family's weight table."""
    shards: list[list[_Planned]] = [[]]
    size = 0
    for theirs, stored in weights.tensors().items():
        planned = _Planned(theirs, TensorInfo(stored.shape, dtype or stored.dtype))
        if shards[-1] and size + planned.info.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += planned.info.num_bytes
    return shards


def shard_names(count: int, pickled: bool = False) -> list[str]:
    """Return the file names that transformers expects."""
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    if count == 1:
        return [f"{stem}.{ending}"]
    return [f"{stem}-{number:05d}-of-{count:05d}.{ending}" for number in range(1, count + 1)]


def _write_pickled(
    weights: HuggingFaceView, path: Path, shard: Sequence[_Planned], on_bytes: OnBytes
) -> None:
    content = {planned.theirs: planned.info for planned in shard}
    with path.open("wb", buffering=0) as file, TorchArchive(file, content) as archive:
        for planned in shard:
            archive.begin_tensor(planned.info)
            for slab in _slabs_of(weights, planned):
                archive.write(as_bytes(slab))
                on_bytes(slab.nbytes)


def _slabs_of(weights: HuggingFaceView, planned: _Planned) -> Iterator[torch.Tensor]:
    index = tuple(slice(0, length) for length in planned.info.shape)
    return slabs(weights, planned.theirs, index, planned.info.dtype)


def _write_header(path: Path, shard: Sequence[_Planned]) -> int:
    """Make a safetensors file of its full size with its header, and return where the data begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in shard:
        end = offset + planned.info.num_bytes
        header[planned.theirs] = {
            "dtype": DTYPE_NAMES[planned.info.dtype],
            "shape": list(planned.info.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb", buffering=0) as file:
        write_all(file, memoryview(struct.pack("<Q", len(encoded)) + encoded))
        start = file.tell()
        file.truncate(start + offset)
    return start


def _runs(shard: Sequence[_Planned]) -> Iterator[tuple[int, list[_Planned]]]:
    """Yield runs of tensors that are written at once, and where each begins in the data."""
    run: list[_Planned] = []
    start = size = 0
    for planned in shard:
        run.append(planned)
        size += planned.info.num_bytes
        if size >= RUN_BYTES:
            yield start, run
            start, size, run = start + size, 0, []
    if run:
        yield start, run


def _write_run(
    weights: HuggingFaceView, path: Path, run: Sequence[_Planned], start: int, on_bytes: OnBytes
) -> None:
    """Write consecutive tensors into a file that has its header already."""
    with path.open("r+b", buffering=0) as file:
        file.seek(start)
        for planned in run:
            for slab in _slabs_of(weights, planned):
                write_all(file, as_bytes(slab))
                on_bytes(slab.nbytes)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
