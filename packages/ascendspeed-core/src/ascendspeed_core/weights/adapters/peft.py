"""Read LoRA adapters in peft's format: `adapter_config.json`, and the matrices A and B of each adapted layer."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families import find_family
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.files.safetensors_files import read_safetensors
from ascendspeed_core.weights.files.torch_files import TorchFile, stored_tensors
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.native.source import TRACKER, iteration_folder
from ascendspeed_core.weights.source import (
    CheckpointError,
    inside,
)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS_AT_ONCE = 256
TIED_HEAD = "lm_head.weight"
"""Hugging Face's name of a head that has no weight of its own."""

_MUST_BE: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
    "target_parameters": (None, []),
}
_LORA = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB])(?:\.\w+)?(?:\.weight)?")
_SAVED = re.compile(r"(.+?)(?:\.modules_to_save|\.base_layer)?(?:\.default)?\.(weight|bias)")


@dataclass(frozen=True)
class HuggingFaceTensor:
    """The tensor of a Hugging Face model that holds one of our tensors.

    Attributes:
        name: of the tensor there.
        rows: which of its rows are ours, in our order; `None` when it holds our tensor alone.
    """

    name: str
    rows: torch.Tensor | None


def hugging_face_tensors(config: ModelConfig) -> dict[str, HuggingFaceTensor]:
    """Return by our name the tensor of the Hugging Face model that holds it.

    Tensors that are fused or transposed there are left out; adapters change whole linear layers.
    """
    mappings = [one for one in find_family(config.family).weights(config) if one.is_plain]
    packed_rows: dict[str, int] = {}
    if any(mapping.packed is not None for mapping in mappings):
        shapes = parameter_shapes(config)
        for mapping in mappings:
            packed_rows[mapping.theirs] = packed_rows.get(mapping.theirs, 0) + shapes[mapping.ours][0]
    found = {}
    for mapping in mappings:
        rows = None
        if mapping.packed is not None:
            total = packed_rows[mapping.theirs]
            every_row = slice(0, mapping.packed.num_rows(config, total))
            parts = mapping.packed.packed_slices(config, total, every_row)
            rows = torch.cat([torch.arange(part.start, part.stop) for part in parts])
        found[mapping.ours] = HuggingFaceTensor(mapping.theirs, rows)
    return found


@dataclass(frozen=True)
class Update:
    """What is added to one tensor of a Hugging Face model.

    Attributes:
        a: [r, in], or [r, ids] for an embedding.
        b: [out, r].
        scale: factor of b @ a.
        is_embedding: the tensor is [ids, H], and a and b are of its transpose.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    is_embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tensor that it is added to."""
        out, into = self.b.shape[0], self.a.shape[1]
        return (into, out) if self.is_embedding else (out, into)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return rows of the update, whole, in fp32."""
        left, right = (self.a.T, self.b.T) if self.is_embedding else (self.b, self.a)
        first = start // ROWS_AT_ONCE * ROWS_AT_ONCE
        parts = [
            left[at : at + ROWS_AT_ONCE].float() @ right.float() * self.scale
            for at in range(first, stop, ROWS_AT_ONCE)
        ]
        return torch.cat(parts)[start - first : stop - first]


class Adapter:
    """The content of an adapter folder.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors` or `.bin`; or the folder of a run that
            trained one, whose newest checkpoint is taken.
        content: tensors and config in place of those files, of adapters that come from elsewhere.

    Raises:
        CheckpointError: it is incomplete, or of a kind that cannot be merged exactly.
    """

    def __init__(
        self, folder: Path, content: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None
    ) -> None:
        if content is None and not (folder / CONFIG).is_file() and (folder / TRACKER).is_file():
            folder = iteration_folder(folder)
        self.folder = folder
        tensors, self.config = content or (_read_tensors(folder), read_json(folder / CONFIG))
        for key, allowed in _MUST_BE.items():
            if self.config.get(key, allowed[0]) not in allowed:
                raise CheckpointError(
                    f"{folder / CONFIG}: {key}={self.config[key]!r} cannot be merged; only {allowed[0]!r} can"
                )
        self.updates: dict[str, Update] = {}
        """By module of the Hugging Face model."""
        self.saved: dict[str, torch.Tensor] = {}
        """Tensors that replace the model's, by name in the Hugging Face model."""
        halves: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX)
            if ".original_module." in name:
                # What a trained module was before; peft keeps it in the file when the vocabulary was resized.
                continue
            lora, saved = _LORA.fullmatch(name), _SAVED.fullmatch(name)
            if lora:
                module, half = lora.group(1), lora.group(2)
                halves.setdefault((module, "embedding" in half), {})[half[-1]] = tensor
            elif saved:
                self.saved[f"{saved.group(1)}.{saved.group(2)}"] = tensor
            else:
                raise CheckpointError(f"{folder} holds {key}, which is nothing that LoRA makes")
        for (module, is_embedding), found in halves.items():
            if found.keys() != {"A", "B"} or found["A"].shape[0] != found["B"].shape[1]:
                raise CheckpointError(f"{folder}: the two halves of {module} do not fit; copy it again")
            rank = found["A"].shape[0]
            self.updates[module] = Update(found["A"], found["B"], self._scale(module, rank), is_embedding)

    @property
    def dropout(self) -> float:
        """Share of an adapter's input that was dropped while it was trained."""
        return float(self.config.get("lora_dropout") or 0)

    def _scale(self, module: str, rank: int) -> float:
        alpha = float(self.config.get("lora_alpha", 8))
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = float(value)
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if path.is_file():
        tensors = read_safetensors(inside(folder, path.name))
        return {name: stored.read() for name, stored in tensors.items()}
    path = folder / "adapter_model.bin"
    if path.is_file():
        file = TorchFile(inside(folder, path.name))
        return {name: stored.read() for name, stored in stored_tensors(file.content)}
    raise CheckpointError(
        f"{folder} has neither adapter_model.safetensors nor adapter_model.bin; check --lora-load"
    )
