"""Write megatron-core's distributed checkpoints (`torch_dist`) without megatron-core and in one process.

See `weights.external.torch_dist` for the files. Megatron-core stores a tensor of all layers as one tensor, whose first
dimension is the layer, unless some layers have experts and others do not.
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
from ascendspeed_core.config.model import ModelConfig
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
                name, part = _stacked(packed, config)
                file.add_slabs(
                    name,
                    TensorInfo(part.sizes, info.dtype),
                    packed_slabs(source, packed, plan.dtype),
                    part,
                )
                count(info.num_bytes)
            if number == 0:
                nothing = _saved_nothing()
                for key in _extra_states(config):
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


def _are_alike(config: ModelConfig) -> bool:
    """Whether all layers have experts, or none: megatron-core then stores a tensor of all layers as one."""
    return len({config.has_experts(layer) for layer in range(config.num_layers)}) == 1


def _stacked(packed: PackedTensor, config: ModelConfig) -> tuple[str, Slice]:
    """Return the name of the tensor that holds all layers, and which part of it this tensor is."""
    match = LAYER_NAME.fullmatch(packed.key)
    index = tuple(slice(0, length) for length in packed.shape)
    if match is None or not _are_alike(config):
        return packed.key, Slice(packed.shape, index)
    layer = int(match.group(1))
    return f"decoder.layers.{match.group(2)}", Slice(
        (config.num_layers, *packed.shape), (slice(layer, layer + 1), *index)
    )


def _extra_states(config: ModelConfig) -> Iterator[str]:
    """Yield the names of the empty states that megatron-core expects of every linear layer."""
    alike, num_layers = _are_alike(config), config.num_layers
    for layer in range(num_layers):
        of_layer, in_stack = ("", [(layer, num_layers)]) if alike else (f"{layer}.", [])
        for module, count in _linear_modules(config, layer):
            for of_experts in [[(number, count)] for number in range(count)] or [[]]:
                shard = [*in_stack, *of_experts] or [(0, 1)]
                offsets, sizes = (".".join(map(str, numbers)) for numbers in zip(*shard, strict=True))
                yield f"decoder.layers.{of_layer}{module}._extra_state/shard_{offsets}_{sizes}"


def _linear_modules(config: ModelConfig, layer: int) -> Iterator[tuple[str, int]]:
    """Yield the linear modules of a layer, and for those of experts how many there are."""
    yield "self_attention.linear_proj", 0
    yield "self_attention.linear_qkv", 0
    experts = config.experts
    for part in ("linear_fc1", "linear_fc2"):
        if experts is None or not config.has_experts(layer):
            yield f"mlp.{part}", 0
            continue
        yield f"mlp.experts.experts.{part}", experts.count
        if experts.shared_ffn_hidden_size is not None:
            yield f"mlp.shared_experts.{part}", 0


def _saved_nothing() -> bytes:
    """Return what megatron-core stores for a layer without an extra state."""
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream.getvalue()


def _write_common(path: Path, content: Namespace) -> None:
    common = {"args": content, "checkpoint_version": 3.0, "iteration": 0}
    with path.open("wb", buffering=0) as file, TorchArchive(file, common):
        pass
