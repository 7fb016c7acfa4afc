"""Write model-parallel checkpoints of AscendSpeed 2023 and Megatron-LM, several files at once."""

import uuid
from pathlib import Path
from typing import Any

from ascendspeed_ckpt.threads import ByteCounter, OnBytes, run_in_threads
from ascendspeed_ckpt.writers.megatron_args import megatron_args
from ascendspeed_ckpt.writers.packed_slabs import packed_slabs
from ascendspeed_ckpt.writers.sidecar import write_sidecar
from ascendspeed_ckpt.writers.write_plan import WritePlan
from ascendspeed_core.weights.external.detect_format import STATES
from ascendspeed_core.weights.external.mp_rank import Rank
from ascendspeed_core.weights.external.packing import PackedTensor
from ascendspeed_core.weights.external.sidecar import Sidecar
from ascendspeed_core.weights.files.torch_archive import TorchArchive
from ascendspeed_core.weights.native.source import TRACKER
from ascendspeed_core.weights.source import WeightSource
from ascendspeed_core.weights.stream import as_bytes
from ascendspeed_data.files import write_durably

RELEASE = "release"
"""Folder and tracker entry of weights without a training state, in Megatron-LM's words."""


def write_mp_rank(
    source: WeightSource,
    folder: Path,
    plan: WritePlan,
    workers: int = 1,
    on_bytes: OnBytes = lambda _: None,
) -> None:
    """Write `release/mp_rank_*/model_optim_rng.pt`, the tracker, and the sidecar.

    Args:
        source: the weights.
        folder: an existing folder.
        plan: layout and names.
        workers: files written at once.
        on_bytes: called with the number of bytes just written.
    """
    release = folder / RELEASE
    checkpoint = uuid.uuid4().hex
    checksums: dict[str, dict[str, int]] = {}
    count = ByteCounter(on_bytes)

    def task(rank: Rank, chunks: list[list[PackedTensor]]) -> None:
        path = release / plan.layout.folder(*rank) / STATES
        path.parent.mkdir(parents=True)
        checksums[f"{path.parent.name}/{STATES}"] = _write_file(
            source, path, plan, rank, chunks, checkpoint, count
        )

    run_in_threads([lambda r=rank, c=chunks: task(r, c) for rank, chunks in plan.plan(source)], workers)  # type: ignore[misc]
    rows = plan.vocabulary_rows(source.config)
    write_sidecar(
        Sidecar(
            plan.kind, source.config, rows, str(plan.layout), checkpoint, dict(sorted(checksums.items()))
        ),
        release,
    )
    write_durably(folder / TRACKER, f"{RELEASE}\n")


def _write_file(
    source: WeightSource,
    path: Path,
    plan: WritePlan,
    rank: Rank,
    chunks: list[list[PackedTensor]],
    checkpoint: str,
    count: ByteCounter,
) -> dict[str, int]:
    """Write one file, and return the checksums of its tensors by name."""
    stored = source.tensors()
    states = [{packed.key: plan.info(packed, stored) for packed in chunk} for chunk in chunks]
    names = ["model"] if len(states) == 1 else [f"model{number}" for number in range(len(states))]
    dtype = next(iter(states[0].values())).dtype
    content = {
        "args": megatron_args(plan, source.config, plan.dtype or dtype),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "tokens": 0,
        "ascendspeed": {**plan.layout.record(*rank), "checkpoint": checkpoint},
        **{name: _nested(state) for name, state in zip(names, states, strict=True)},
    }
    with path.open("wb", buffering=0) as file, TorchArchive(file, content) as archive:
        for chunk in chunks:
            for packed in chunk:
                archive.begin_tensor(plan.info(packed, stored))
                for slab in packed_slabs(source, packed, plan.dtype):
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
