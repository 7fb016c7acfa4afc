"""Names that Hugging Face's code gives to our tensors and to the modules that hold them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import is_matrix
from ascendspeed_core.models.families import find_family
from ascendspeed_core.weights.load import parameter_shapes

TIED_HEAD = "lm_head.weight"
"""Hugging Face's name of a head that has no weight of its own."""

ModuleKind = Literal["linear", "embedding", "other", "fused", "container"]
"""What a module is to an adapter; a fused one holds several of our tensors, or a transposed one."""


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
            rows = torch.cat([torch.arange(part.start, part.stop, part.step or 1) for part in parts])
        found[mapping.ours] = HuggingFaceTensor(mapping.theirs, rows)
    return found


def hugging_face_modules(config: ModelConfig) -> Mapping[str, ModuleKind]:
    """Return by its name what each module of the Hugging Face model is, those that only hold others included.

    Modules without weights, such as an activation, are left out.
    """
    shapes = parameter_shapes(config)
    modules: dict[str, ModuleKind] = {}
    for mapping in find_family(config.family).weights(config):
        module = mapping.theirs.rpartition(".")[0]
        parts = module.split(".")
        for length in range(1, len(parts)):
            modules.setdefault(".".join(parts[:length]), "container")
        if mapping.ours.endswith("_norm.weight"):
            modules[module] = "other"
        elif not mapping.is_plain:
            modules[module] = "fused"
        elif mapping.ours == "embedding.weight":
            modules[module] = "embedding"
        elif mapping.ours.endswith(".weight"):
            # A head that divides by the lengths of its rows is no linear layer in that code either.
            is_plain = mapping.ours != "output_head.weight" or not config.normalised_head
            modules[module] = (
                "linear" if is_matrix(mapping.ours, shapes[mapping.ours]) and is_plain else "other"
            )
    if config.tie_word_embeddings:
        modules[TIED_HEAD.removesuffix(".weight")] = "linear"
    return modules
