"""Write model-parallel checkpoints of other systems, several files at once, each from its start to its end."""

import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.weights.external.detect_format import STATES
from ascendspeed_core.weights.external.mp_rank import rotary_frequencies
from ascendspeed_core.weights.external.name_maps import ROTARY
from ascendspeed_core.weights.external.packing import Block, Packed
from ascendspeed_core.weights.external.sidecar import Record
from ascendspeed_core.weights.external.write_plan import WritePlan, arguments
from ascendspeed_core.weights.files.torch_archive import TorchArchive
from ascendspeed_core.weights.native.source import TRACKER
from ascendspeed_core.weights.source import WeightSource
from ascendspeed_core.weights.stream import SLAB_BYTES, Counted, OnBytes, as_bytes, as_format, slabs, together
from ascendspeed_data.files import write_durably

RELEASE = "release"
"""Folder and tracker entry of weights without a training state, in Megatron-LM's words."""


def write_sharded(
    source: WeightSource,
    folder: Path,
    target: WritePlan,
    workers: int = 1,
    on_bytes: OnBytes = lambda _: None,
) -> None:
    """Write `release/mp_rank_*/model_optim_rng.pt`, the tracker, and our record.

    Args:
        source: the weights.
        folder: an existing folder.
        target: how it is to look.
        workers: files written at once.
        on_bytes: told how many bytes were written.
    """
    place = folder / RELEASE
    checkpoint = uuid.uuid4().hex
    checksums: dict[str, dict[str, int]] = {}
    count = Counted(on_bytes)

    def task(rank: tuple[int, int], chunks: list[list[Packed]]) -> None:
        path = place / target.layout.folder(*rank) / STATES
        path.parent.mkdir(parents=True)
        checksums[f"{path.parent.name}/{STATES}"] = _write_file(
            source, path, target, rank, chunks, checkpoint, count
        )

    together([lambda r=rank, c=chunks: task(r, c) for rank, chunks in target.plan(source)], workers)  # type: ignore[misc]
    rows = target.vocabulary_rows(source.config)
    Record(
        target.kind, source.config, rows, str(target.layout), checkpoint, dict(sorted(checksums.items()))
    ).write(place)
    write_durably(folder / TRACKER, f"{RELEASE}\n")


def block_slabs(source: WeightSource, block: Block, dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
    """Yield the rows of a block as contiguous slabs."""
    if block.name == ROTARY:
        yield rotary_frequencies(source.config)
    elif block.repeats:
        row = as_format(source.read(block.name, block.index), dtype, block.name)
        at_once = max(SLAB_BYTES // max(row.nbytes, 1), 1)
        for start in range(0, block.repeats, at_once):
            rows = min(at_once, block.repeats - start)
            yield row.expand(rows, *row.shape[1:]).contiguous()
    else:
        yield from slabs(source, block.name, block.index, dtype)


def packed_slabs(
    source: WeightSource, blocks: Iterable[Block], dtype: torch.dtype | None
) -> Iterator[torch.Tensor]:
    """Yield a stored tensor from its first row to its last."""
    for block in blocks:
        yield from block_slabs(source, block, dtype)


def _write_file(
    source: WeightSource,
    path: Path,
    target: WritePlan,
    rank: tuple[int, int],
    chunks: list[list[Packed]],
    checkpoint: str,
    count: Counted,
) -> dict[str, int]:
    """Write one file, and return the checksums of its tensors by name."""
    stored = source.tensors()
    states = [{packed.key: target.info(packed, stored) for packed in chunk} for chunk in chunks]
    names = ["model"] if len(states) == 1 else [f"model{number}" for number in range(len(states))]
    dtype = next(iter(states[0].values())).dtype
    content = {
        "args": arguments(target, source.config, target.dtype or dtype),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "tokens": 0,
        "ascendspeed": {"tensor_rank": rank[0], "stage": rank[1], "checkpoint": checkpoint},
        **{name: _nested(state) for name, state in zip(names, states, strict=True)},
    }
    with path.open("wb", buffering=0) as file, TorchArchive(file, content) as archive:
        for chunk in chunks:
            for packed in chunk:
                archive.begin_tensor(target.info(packed, stored))
                for slab in packed_slabs(source, packed.blocks, target.dtype):
                    archive.write(as_bytes(slab))
                    count(slab.nbytes)
    keys = [
        f"{name}.{packed.key.replace('/', '.')}"
        for name, chunk in zip(names, chunks, strict=True)
        for packed in chunk
    ]
    return dict(zip(keys, archive.checksums, strict=True))


def _nested(state: dict[str, Any]) -> dict[str, Any]:
    """Turn `a/b` into dictionaries inside one another; the order of tensors stays."""
    result: dict[str, Any] = {}
    for key, value in state.items():
        *outer, name = key.split("/")
        inner = result
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[name] = value
    return result
