"""Write a native checkpoint of weights alone, slab by slab: memory does not grow with the model."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ascendspeed_ckpt.threads import ByteCounter, OnBytes, run_in_threads
from ascendspeed_core import __version__
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.weights.files.distributed_writer import TensorFile, WrittenShard, write_metadata
from ascendspeed_core.weights.native.description import FORMAT_VERSION
from ascendspeed_core.weights.native.source import DESCRIPTION, TRACKER, NativeSource
from ascendspeed_core.weights.source import TensorInfo, WeightSource
from ascendspeed_core.weights.stream import slabs
from ascendspeed_data.files import write_durably


def write_native(
    source: WeightSource,
    folder: Path,
    dtype: torch.dtype | None,
    on_bytes: OnBytes = lambda _: None,
    workers: int = 1,
    run: NativeSource | None = None,
) -> None:
    """Write a run's folder with the weights at iteration 0, from which training starts with fresh data.

    With the training state of another native checkpoint it is a copy of that checkpoint, and training resumes.

    Args:
        source: the weights.
        folder: an existing folder.
        dtype: of the written weights; by default the stored one.
        on_bytes: called with the number of bytes just written.
        workers: files written at once.
        run: the checkpoint that `source` reads, to copy its optimizer and random states.
    """
    iteration = int(run.description["iteration"]) if run is not None else 0
    checkpoint = folder / f"iter_{iteration:07d}"
    checkpoint.mkdir()
    shards = write_files(source, checkpoint, dtype, on_bytes, workers)
    if run is not None:
        shards += _write_state(run, checkpoint, workers)
    write_metadata(checkpoint, shards)
    if run is not None:
        _finish(
            folder,
            checkpoint,
            run.description | {"ascendspeed_core": __version__, "torch": torch.__version__},
        )
        return
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
        "layout": asdict(Layout()),
        "loss_scale": None,
        "dtype": str(shards[0].dtype).removeprefix("torch."),
        "model": source.config.model_dump(mode="json"),
        "run": {},
    }
    _finish(folder, checkpoint, description)


def _finish(folder: Path, checkpoint: Path, description: Mapping[str, Any]) -> None:
    write_durably(checkpoint / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    write_durably(folder / TRACKER, f"{description['iteration']}\n")


def _write_state(run: NativeSource, checkpoint: Path, number: int) -> list[WrittenShard]:
    """Write everything but the weights into a file of its own."""
    with TensorFile(checkpoint, number) as file:
        for name in run.stored.names():
            if not name.startswith("model/"):
                file.add(name, run.stored.read(name))
    return file.shards


def write_files(
    source: WeightSource, checkpoint: Path, dtype: torch.dtype | None, on_bytes: OnBytes, workers: int
) -> list[WrittenShard]:
    """Write all weights into one file for each worker, of about equal sizes."""
    shares: list[list[str]] = [[] for _ in range(workers)]
    loads = [0] * workers
    tensors = source.tensors()
    for name, info in tensors.items():
        lightest = loads.index(min(loads))
        shares[lightest].append(name)
        loads[lightest] += info.num_bytes
    shards: list[list[WrittenShard]] = [[] for _ in shares]
    count = ByteCounter(on_bytes)

    def write(number: int) -> None:
        with TensorFile(checkpoint, number) as file:
            for name in shares[number]:
                info = tensors[name]
                index = tuple(slice(0, length) for length in info.shape)
                written = TensorInfo(info.shape, dtype or info.dtype)
                file.add_slabs(f"model/{name}", written, slabs(source, name, index, dtype))
                count(written.num_bytes)
        shards[number] = file.shards

    run_in_threads([partial(write, number) for number, share in enumerate(shares) if share], workers)
    return [shard for share in shards for shard in share]
