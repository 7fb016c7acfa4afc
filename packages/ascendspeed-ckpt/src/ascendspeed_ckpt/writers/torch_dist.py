"""Write megatron-core's distributed checkpoints (`torch_dist`) without megatron-core and in one process.

See `weights.external.torch_dist` for the files. Megatron-core stores a tensor of all layers as one tensor, whose first
dimension is the layer.
"""

import io
import json
import uuid
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from ascendspeed_ckpt.threads import ByteCounter, OnBytes, run_in_threads
from ascendspeed_ckpt.writers.megatron_args import megatron_args
from ascendspeed_ckpt.writers.mp_rank import RELEASE
from ascendspeed_ckpt.writers.packed_slabs import packed_slabs
from ascendspeed_ckpt.writers.sidecar import write_sidecar
from ascendspeed_ckpt.writers.write_plan import WritePlan
from ascendspeed_core.config.sharding import Slice
from ascendspeed_core.weights.external.packing import PackedTensor
from ascendspeed_core.weights.external.sidecar import Sidecar
from ascendspeed_core.weights.external.torch_dist import BACKEND, COMMON, LAYER_NAME
from ascendspeed_core.weights.files.distributed_writer import (
    TensorFile,
    WrittenObject,
    WrittenShard,
    write_metadata,
)
from ascendspeed_core.weights.files.torch_archive import TorchArchive
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.native.source import TRACKER
from ascendspeed_core.weights.shard_layout import shard_layout
from ascendspeed_core.weights.source import TensorInfo, WeightSource
from ascendspeed_data.files import write_durably

_WITH_EXTRA_STATE = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


def write_torch_dist(
    source: WeightSource,
    folder: Path,
    plan: WritePlan,
    workers: int = 1,
    on_bytes: OnBytes = lambda _: None,
) -> None:
    """Write `release/` with `.metadata`, `*.distcp`, `common.pt` and `metadata.json`, the tracker, and the sidecar.

    Args:
        source: the weights.
        folder: an existing folder.
        plan: names; its layout decides only the arguments and the padding of the vocabulary.
        workers: files written at once.
        on_bytes: called with the number of bytes just written.
    """
    release = folder / RELEASE
    release.mkdir()
    config = source.config
    shapes, rows = parameter_shapes(config), plan.vocabulary_rows(config)
    whole = shard_layout(config.num_layers).stage(0, 0)
    planned = list(plan.name_map(config).of_chunk(shapes, config, whole, rows))
    shares: list[list[PackedTensor]] = [planned[number::workers] for number in range(workers)]
    stored, count = source.tensors(), ByteCounter(on_bytes)
    shards: list[list[WrittenShard]] = [[] for _ in shares]
    objects: list[WrittenObject] = []

    def write(number: int) -> None:
        with TensorFile(release, number) as file:
            for packed in shares[number]:
                info = plan.info(packed, stored)
                name, part = _stacked(packed, config.num_layers)
                file.add_slabs(
                    name,
                    TensorInfo(part.sizes, info.dtype),
                    packed_slabs(source, packed, plan.dtype),
                    part,
                )
                count(info.num_bytes)
            if number == 0:
                nothing = _saved_nothing()
                for key in _extra_states(config.num_layers):
                    file.add_object(key, nothing)
                objects.extend(file.objects)
        shards[number] = file.shards

    run_in_threads([partial(write, number) for number, share in enumerate(shares) if share], workers)
    write_metadata(release, [shard for share in shards for shard in share], objects)
    dtype = plan.dtype or next(iter(stored.values())).dtype
    _write_common(release / COMMON, megatron_args(plan, config, dtype))
    backend = {"sharded_backend": plan.kind, "sharded_backend_version": 1, "common_backend": "torch"}
    write_durably(release / BACKEND, json.dumps(backend | {"common_backend_version": 1}))
    write_sidecar(Sidecar(plan.kind, config, rows, str(plan.layout), uuid.uuid4().hex, {}), release)
    write_durably(folder / TRACKER, f"{RELEASE}\n")


def _stacked(packed: PackedTensor, num_layers: int) -> tuple[str, Slice]:
    """Return the name of the tensor that holds all layers, and which part of it this tensor is."""
    match = LAYER_NAME.fullmatch(packed.key)
    index = tuple(slice(0, length) for length in packed.shape)
    if match is None:
        return packed.key, Slice(packed.shape, index)
    layer = int(match.group(1))
    return f"decoder.layers.{match.group(2)}", Slice(
        (num_layers, *packed.shape), (slice(layer, layer + 1), *index)
    )


def _extra_states(num_layers: int) -> Iterator[str]:
    """Yield the names of the empty states that megatron-core expects of every linear layer."""
    for module in _WITH_EXTRA_STATE:
        for layer in range(num_layers):
            yield f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}"


def _saved_nothing() -> bytes:
    """Return what megatron-core stores for a layer without an extra state."""
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream.getvalue()


def _write_common(path: Path, content: Namespace) -> None:
    common = {"args": content, "checkpoint_version": 3.0, "iteration": 0}
    with path.open("wb", buffering=0) as file, TorchArchive(file, common):
        pass
