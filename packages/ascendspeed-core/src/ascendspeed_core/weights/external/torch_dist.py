"""Read megatron-core's distributed checkpoints (`torch_dist`) without megatron-core and in one process.

    latest_checkpointed_iteration.txt     "100" or "release"
    iter_0000100/ or release/
        metadata.json                     {"sharded_backend": "torch_dist", ...}
        common.pt                         args, iteration
        .metadata, *.distcp               DCP; tensors of `GPTModel`, uncut but packed

Tensors of all layers are one tensor with the layer as its first dimension, or one for each layer if the layers are
not alike (`non_homogeneous_layers`); both are read, and written as megatron-core 0.16 does: by layer where some have
experts and others do not. The experts of a layer are one more dimension.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.derived_tensors import derived_reason
from ascendspeed_core.weights.external.config_of_arguments import CheckpointFacts
from ascendspeed_core.weights.external.megatron_args import read_arguments, resolve_config
from ascendspeed_core.weights.external.model_state import EXTRA_STATE, EXTRA_STATE_REASON
from ascendspeed_core.weights.external.mp_rank import iteration_folder
from ascendspeed_core.weights.external.name_maps import megatron_distributed
from ascendspeed_core.weights.external.sharded_tensors import ShardedTensors
from ascendspeed_core.weights.external.sidecar import read_sidecar, written_by
from ascendspeed_core.weights.external.source import ExternalSource
from ascendspeed_core.weights.files.distributed_reader import DistributedTensors
from ascendspeed_core.weights.files.torch_files import TorchFile
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.shard_layout import ShardLayout, shard_layout
from ascendspeed_core.weights.source import CheckpointError, Index, TensorInfo
from ascendspeed_core.weights.stream import equal_tensors

BACKEND = "metadata.json"
COMMON = "common.pt"
LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
HEAD = "output_layer.weight"
_OPTIMIZER = ("optimizer.", "chained_")


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


class TorchDistSource(ExternalSource):
    """The weights of a megatron-core distributed checkpoint as one logical model.

    Args:
        path: the folder with the tracker, or the one with `metadata.json`.
        config: the architecture, where the checkpoint does not include it.
        vocab_size: vocabulary size without padding, where the checkpoint does not record it.
        fallback_config: called for the architecture when neither the checkpoint nor `config` gives it.
    """

    kind = "torch_dist"

    def __init__(
        self,
        path: Path,
        config: ModelConfig | None = None,
        vocab_size: int | None = None,
        fallback_config: Callable[[], ModelConfig | None] = lambda: None,
    ) -> None:
        super().__init__()
        self.path: Path | None = path
        self.folder = iteration_folder(path)
        self.sidecar = read_sidecar(self.folder)
        self.stored = DistributedTensors(self.folder)
        common = self.folder / COMMON
        self.arguments: Any = read_arguments(TorchFile(common)) if common.is_file() else None
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
        layers = {int(match.group(1)) for key in found if (match := LAYER_NAME.fullmatch(key))}
        self.layout: ShardLayout = shard_layout(len(layers) or 1)
        facts = CheckpointFacts(
            "megatron", "Transformer Engine", self.folder, self.layout, found, self.vocabulary_rows
        )
        self.config: ModelConfig = resolve_config(
            facts, self.sidecar, self.arguments, config, vocab_size, fallback_config
        )
        shapes = parameter_shapes(self.config)
        self._sharded = ShardedTensors(shapes)
        own_layers = not any(key.endswith("pre_mlp_layernorm.weight") for key in found)
        name_map, stage = megatron_distributed(own_layers), self.layout.stage(0, 0)
        for packed in name_map.of_chunk(shapes, self.config, stage, self.vocabulary_rows):
            if packed.key not in found:
                raise CheckpointError(
                    f"{self.folder} lacks {packed.key}; it is of another model, or incomplete"
                )
            self._sharded.add(f"{self.folder}: {packed.key}", packed, found.pop(packed.key))
        self._note_left_out(found)
        states = {name.partition("/")[0] for name in self.stored.objects() if EXTRA_STATE in name}
        self._left_out |= dict.fromkeys(sorted(states), EXTRA_STATE_REASON)
        if found:
            raise CheckpointError(
                f"{self.folder} holds {len(found)} tensors that the model does not have, first {min(found)}"
            )
        self._sharded.check_complete(self.folder, shapes)

    def _note_left_out(self, found: dict[str, _LayerOf]) -> None:
        """Take out what repeats the config or, under a tied one, the embedding; each is compared."""
        for key, tensor in list(found.items()):
            reason = derived_reason(key, tensor, self.config, self.folder)
            if key == HEAD and self.config.tie_word_embeddings:
                embedding = _LayerOf(self.stored, f"{self._prefix}embedding.word_embeddings.weight", None)
                if not equal_tensors(tensor, embedding):
                    raise CheckpointError(
                        f"{self.folder}: {key} differs from the embedding, to which the model's config ties it; name a "
                        "config with tie_word_embeddings=false"
                    )
                reason = "equal to the embedding, to which the head is tied"
            if reason is not None:
                self._left_out[key] = reason
                del found[key]

    def other_contents(self) -> list[str]:
        """Name what is stored beside the weights of the model."""
        objects = [name for name in self.stored.objects() if EXTRA_STATE not in name]
        optimizer = {name for name in (*self.stored.names(), *objects) if name.startswith(_OPTIMIZER)}
        others = {name.partition("/")[0] for name in objects if name not in optimizer}
        return sorted(others | ({"optimizer"} if optimizer else set()))

    def check(self) -> bool:
        """Read everything once and compare the checksums."""
        self.stored.check()
        return True

    def details(self) -> dict[str, Any]:
        """Return layout, rows of the embedding with padding, and who wrote the checkpoint."""
        return super().details() | {"written by": written_by(self.sidecar)}

    def _found(self) -> dict[str, _LayerOf]:
        """Return all weights by megatron-core's name with the layer's number."""
        found = {}
        for name in self.stored.names():
            if name.startswith(_OPTIMIZER):
                continue
            key = name.removeprefix(self._prefix)
            stacked = key.startswith("decoder.layers.") and not LAYER_NAME.fullmatch(key)
            if not stacked:
                found[key] = _LayerOf(self.stored, name, None)
                continue
            for layer in range(self.stored.info(name).shape[0]):
                inner = key.removeprefix("decoder.layers.")
                found[f"decoder.layers.{layer}.{inner}"] = _LayerOf(self.stored, name, layer)
        return found
