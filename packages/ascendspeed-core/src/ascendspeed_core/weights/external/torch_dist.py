"""Read and write megatron-core's distributed checkpoints (`torch_dist`) without megatron-core and without processes.

    latest_checkpointed_iteration.txt     "100" or "release"
    iter_0000100/ or release/
        metadata.json                     {"sharded_backend": "torch_dist", ...}
        common.pt                         args, iteration
        .metadata, *.distcp               DCP; tensors of `GPTModel`, uncut but packed

Tensors of all layers are one tensor with the layer as its first dimension, or one for each layer if the layers are
not alike (`non_homogeneous_layers`); both are read, the first is written, which is megatron-core 0.16's own choice.
"""

import io
import json
import re
import uuid
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import Slice
from ascendspeed_core.weights.external.layout import ShardLayout, shard_layout
from ascendspeed_core.weights.external.megatron_args import Facts, resolve_config
from ascendspeed_core.weights.external.mp_rank import iteration_folder
from ascendspeed_core.weights.external.name_maps import megatron
from ascendspeed_core.weights.external.packing import Packed
from ascendspeed_core.weights.external.sharded_tensors import ShardedTensors, ShardedTensorSource
from ascendspeed_core.weights.external.sidecar import Record, read_record
from ascendspeed_core.weights.external.write_mp_rank import RELEASE, packed_slabs
from ascendspeed_core.weights.external.write_plan import WritePlan, arguments
from ascendspeed_core.weights.files.torch_archive import TorchArchive
from ascendspeed_core.weights.files.torch_files import TorchFile
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.native.source import TRACKER, DistributedTensors
from ascendspeed_core.weights.native.write_tensors import (
    TensorFile,
    WrittenObject,
    WrittenShard,
    write_metadata,
)
from ascendspeed_core.weights.source import CheckpointError, Index, TensorInfo, WeightSource
from ascendspeed_core.weights.stream import Counted, OnBytes, together
from ascendspeed_data.files import write_durably

BACKEND = "metadata.json"
COMMON = "common.pt"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_OPTIMIZER = ("optimizer.", "chained_")
_WITH_EXTRA_STATE = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class _LayerOf:
    """One layer of a tensor that holds all layers."""

    stored: DistributedTensors
    name: str
    layer: int | None

    @property
    def info(self) -> TensorInfo:
        whole = self.stored.info(self.name)
        return whole if self.layer is None else TensorInfo(whole.shape[1:], whole.dtype)

    def read(self, index: Index = ()) -> torch.Tensor:
        if self.layer is None:
            return self.stored.read(self.name, index)
        index = index or tuple(slice(0, length) for length in self.info.shape)
        return self.stored.read(self.name, (slice(self.layer, self.layer + 1), *index))[0]


class TorchDistSource(ShardedTensorSource):
    """The weights of a megatron-core distributed checkpoint as one logical model.

    Args:
        path: the folder with the tracker, or the one with `metadata.json`.
        config: the architecture, where the checkpoint does not say it.
        vocab_size: rows of the embedding that are not filling, where the checkpoint does not say it.
    """

    kind = "torch_dist"

    def __init__(self, path: Path, config: ModelConfig | None = None, vocab_size: int | None = None) -> None:
        self.path: Path | None = path
        self.folder = iteration_folder(path)
        self.record = read_record(self.folder)
        self.stored = DistributedTensors(self.folder)
        common = self.folder / COMMON
        content = TorchFile(common).content if common.is_file() else {}
        self.arguments: Any = content.get("args") if isinstance(content, dict) else None
        prefix = next(
            (p for p in ("", "model.") if f"{p}embedding.word_embeddings.weight" in self.stored.names()), None
        )
        if prefix is None:
            raise CheckpointError(
                f"{self.folder} holds no embedding.word_embeddings.weight; it is of no GPTModel"
            )
        self._prefix = prefix
        found = self._found()
        self.vocabulary_rows = found["embedding.word_embeddings.weight"].info.shape[0]
        layers = {int(match.group(1)) for key in found if (match := _LAYER.fullmatch(key))}
        self.layout: ShardLayout = shard_layout(len(layers) or 1)
        facts = Facts("megatron", "Transformer Engine", self.folder, self.layout, found, self.vocabulary_rows)
        self.config: ModelConfig = resolve_config(facts, self.record, self.arguments, config, vocab_size)
        shapes = parameter_shapes(self.config)
        self._placed = ShardedTensors(shapes)
        table, stage = megatron(True), self.layout.stage(0, 0)
        for packed in table.of_stage(shapes, self.config, stage, self.vocabulary_rows):
            if packed.key not in found:
                raise CheckpointError(
                    f"{self.folder} lacks {packed.key}; it is of another model, or incomplete"
                )
            self._placed.add(f"{self.folder}: {packed.key}", packed, found.pop(packed.key))
        if found:
            raise CheckpointError(
                f"{self.folder} holds {len(found)} tensors that the model has no place for, first {min(found)}"
            )
        self._placed.check_complete(self.folder, shapes)

    def left_behind(self) -> list[str]:
        """Name what else is stored and is not weights of the model."""
        kinds = {"optimizer" for name in self.stored.names() if name.startswith(_OPTIMIZER)}
        return sorted(kinds)

    def check(self) -> None:
        """Read everything once and compare the checksums."""
        self.stored.check()

    def _found(self) -> dict[str, _LayerOf]:
        """Return all weights by megatron-core's name with the layer's number."""
        found = {}
        for name in self.stored.names():
            if name.startswith(_OPTIMIZER):
                continue
            key = name.removeprefix(self._prefix)
            stacked = key.startswith("decoder.layers.") and not _LAYER.fullmatch(key)
            if not stacked:
                found[key] = _LayerOf(self.stored, name, None)
                continue
            for layer in range(self.stored.info(name).shape[0]):
                inner = key.removeprefix("decoder.layers.")
                found[f"decoder.layers.{layer}.{inner}"] = _LayerOf(self.stored, name, layer)
        return found


def write_torch_dist(
    source: WeightSource,
    folder: Path,
    target: WritePlan,
    workers: int = 1,
    on_bytes: OnBytes = lambda _: None,
) -> None:
    """Write `release/` with `.metadata`, `*.distcp`, `common.pt` and `metadata.json`, the tracker, and our record.

    Args:
        source: the weights.
        folder: an existing folder.
        target: how it is to look; its layout tells the arguments and the filling of the vocabulary only.
        workers: files written at once.
        on_bytes: told how many bytes were written.
    """
    place = folder / RELEASE
    place.mkdir()
    config = source.config
    shapes, rows = parameter_shapes(config), target.vocabulary_rows(config)
    whole = shard_layout(config.num_layers).stage(0, 0)
    planned = list(target.table(config).of_stage(shapes, config, whole, rows))
    shares: list[list[Packed]] = [planned[number::workers] for number in range(workers)]
    stored, count = source.tensors(), Counted(on_bytes)
    pieces: list[list[WrittenShard]] = [[] for _ in shares]
    objects: list[WrittenObject] = []

    def write(number: int) -> None:
        with TensorFile(place, number) as file:
            for packed in shares[number]:
                info = target.info(packed, stored)
                name, part = _stacked(packed, config.num_layers)
                file.add_slabs(
                    name,
                    TensorInfo(part.sizes, info.dtype),
                    packed_slabs(source, packed.blocks, target.dtype),
                    part,
                )
                count(info.num_bytes)
            if number == 0:
                nothing = _saved_nothing()
                for key in _extra_states(config.num_layers):
                    file.add_object(key, nothing)
                objects.extend(file.objects)
        pieces[number] = file.pieces

    together([partial(write, number) for number, share in enumerate(shares) if share], workers)
    write_metadata(place, [piece for share in pieces for piece in share], objects)
    dtype = target.dtype or next(iter(stored.values())).dtype
    _write_common(place / COMMON, arguments(target, config, dtype))
    backend = {"sharded_backend": target.kind, "sharded_backend_version": 1, "common_backend": "torch"}
    write_durably(place / BACKEND, json.dumps(backend | {"common_backend_version": 1}))
    Record(target.kind, config, rows, str(target.layout), uuid.uuid4().hex, {}).write(place)
    write_durably(folder / TRACKER, f"{RELEASE}\n")


def _stacked(packed: Packed, num_layers: int) -> tuple[str, Slice]:
    """Return name and piece of a tensor when those of all layers are one tensor."""
    match = _LAYER.fullmatch(packed.key)
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
