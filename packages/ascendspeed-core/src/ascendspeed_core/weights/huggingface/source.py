"""Read a Hugging Face folder by slices: safetensors, one or several files with an index, or `.bin`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.launch import announce
from ascendspeed_core.models.families import Family, TensorMapping, family_of_hugging_face
from ascendspeed_core.models.families.base import PREDICTED_LAYERS, leading_shape
from ascendspeed_core.weights.derived_tensors import derived_reason
from ascendspeed_core.weights.files.file_tensor import StoredTensor
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.huggingface.block_scales import plain_tensors
from ascendspeed_core.weights.huggingface.config import generation_ids
from ascendspeed_core.weights.huggingface.files import open_weight_files
from ascendspeed_core.weights.huggingface.fit import check_names, check_shapes
from ascendspeed_core.weights.huggingface.quantised import refuse_quantised
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.source import (
    WEIGHT_DTYPES,
    BaseWeightSource,
    CheckpointError,
    Index,
    LeftOut,
    TensorInfo,
    group_left_out,
)
from ascendspeed_core.weights.stream import first_different_row
from ascendspeed_data.tokenizer import DEFINING_FILES

EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class StoredWeights:
    """A model under Hugging Face's names in files that are not those of a Hugging Face folder.

    Attributes:
        hf_config: content of its config.json.
        tensors: by name.
    """

    hf_config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


class HuggingFaceSource(BaseWeightSource):
    """All weights of a Hugging Face folder under our names; nothing is read until it is asked for.

    Args:
        path: the folder.
        stored: config and tensors, where they lie in other files.
    """

    kind = "huggingface"

    def __init__(self, path: Path, stored: StoredWeights | None = None) -> None:
        self.path: Path | None = path
        self._folder = path
        where = path / "config.json"
        self.hf_config = read_json(where) if stored is None else stored.hf_config
        self.family: Family = family_of_hugging_face(self.hf_config, str(where))
        found = open_weight_files(path) if stored is None else stored.tensors
        self._stored, rest = plain_tensors(path, self.hf_config, found)
        refuse_quantised(path, rest, {name: stored.info for name, stored in self._stored.items()})
        self._left_out: dict[str, str] = {}
        self._embedding_is_head = False
        self.config = self.family.read_config({**rest, **generation_ids(path)}, str(where))
        self.family = self.family.in_layout_of(self._stored.keys(), self.config)
        if self.config.tie_word_embeddings:
            self._compare_head()
        self._mappings = self._mappings_of_this_folder()
        self._leading_shapes = self._leading_shapes_of_fused()
        self._check_names()
        names = {ours: mappings[0].theirs for ours, mappings in self._mappings.items()}
        check_shapes(path, self.family, self.config, self._infos, parameter_shapes(self.config), names)

    @property
    def tokenizer(self) -> Path | None:
        """The folder itself, if a tokenizer lies in it."""
        return self._folder if any((self._folder / name).is_file() for name in DEFINING_FILES) else None

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by our name."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {ours: self._info_of(mappings) for ours, mappings in self._mappings.items()}

    def left_out(self) -> Sequence[LeftOut]:
        """Return copies of other tensors, and buffers that the config says too; each was compared."""
        return group_left_out(self._left_out)

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a slice; only its bytes leave the disk."""
        mappings = self._mappings[name]
        depth = len(mappings[0].our_position)
        if depth == 0:
            return self._read_member(mappings[0], index)
        index = index or tuple(slice(0, length) for length in self._infos[name].shape)
        stack, inner = index[:depth], index[depth:]
        members = [
            self._read_member(mapping, inner)
            for mapping in mappings
            if all(part.start <= at < part.stop for at, part in zip(mapping.our_position, stack, strict=True))
        ]
        sizes = [part.stop - part.start for part in index]
        if not members:
            return torch.empty(sizes, dtype=self._infos[name].dtype)
        return torch.stack(members).reshape(sizes)

    def _read_member(self, mapping: TensorMapping, index: Index) -> torch.Tensor:
        """Read a slice of the tensor, or of the member of a stack, that a mapping is about."""
        packed, theirs = mapping.packed, mapping.theirs
        if packed is None and mapping.is_plain:
            return self._read(theirs, index)
        shape = self._matrix_shape(mapping)
        if not index:
            rows = shape[0] if packed is None else packed.num_rows(self.config, shape[0])
            index = tuple(slice(0, length) for length in (rows, *shape[1:]))
        row_slices = [index[0]] if packed is None else packed.packed_slices(self.config, shape[0], index[0])
        pieces = [self._read_matrix(mapping, (rows, *index[1:])) for rows in row_slices]
        if not pieces:
            return self._read_matrix(mapping, (slice(0, 0), *index[1:]))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _read_matrix(self, mapping: TensorMapping, index: Index) -> torch.Tensor:
        """Read a slice of one matrix of their tensor, given and returned in our orientation."""
        position = tuple(slice(at, at + 1) for at in mapping.their_position)
        is_swapped = mapping.transposed and len(index) == 2
        step, index = index[0].step or 1, (slice(index[0].start, index[0].stop), *index[1:])
        found = self._read(mapping.theirs, (*position, *(reversed(index) if is_swapped else index)))
        found = found.reshape(found.shape[len(position) :])
        return (found.T if is_swapped else found)[::step]

    def _matrix_shape(self, mapping: TensorMapping) -> tuple[int, ...]:
        """Shape of one matrix of their tensor in our orientation, whatever is packed in it."""
        shape = self._info(mapping.theirs).shape[len(mapping.their_position) :]
        return shape[::-1] if mapping.transposed and len(shape) == 2 else shape

    def _read(self, theirs: str, index: Index) -> torch.Tensor:
        return self._stored[theirs].read(index)

    def _mappings_of_this_folder(self) -> dict[str, list[TensorMapping]]:
        """The family's table by our names; a folder of a model without its head leaves the prefix out."""
        prefix = self.family.prefix
        has_prefix = not prefix or any(name.startswith(prefix) for name in self._stored)
        found: dict[str, list[TensorMapping]] = {}
        for mapping in self.family.weights(self.config):
            theirs = mapping.theirs if has_prefix else mapping.theirs.removeprefix(prefix)
            if mapping.ours == EMBEDDING and self._embedding_is_head:
                theirs = self._head_name()
            found.setdefault(mapping.ours, []).append(replace(mapping, theirs=theirs))
        return found

    def _leading_shapes_of_fused(self) -> dict[str, tuple[int, ...]]:
        """Leading dimensions that the family's table gives their fused tensors."""
        positions: dict[str, list[tuple[int, ...]]] = {}
        for mapping in (mapping for mappings in self._mappings.values() for mapping in mappings):
            if mapping.their_position:
                positions.setdefault(mapping.theirs, []).append(mapping.their_position)
        return {theirs: leading_shape(found) for theirs, found in positions.items()}

    def _info(self, theirs: str) -> TensorInfo:
        info = self._stored[theirs].info
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{self._folder}: {theirs} is stored as {info.dtype}, which is not a format of weights"
            )
        return info

    def _info_of(self, mappings: Sequence[TensorMapping]) -> TensorInfo:
        """Return shape and dtype of one of our tensors."""
        members = [self._info_of_member(mapping) for mapping in mappings]
        if len(set(members)) > 1:
            raise CheckpointError(
                f"{self._folder}: {mappings[0].theirs} and others of {mappings[0].ours} have different shapes or "
                "dtypes; copy the folder again"
            )
        stack = leading_shape(mapping.our_position for mapping in mappings)
        return TensorInfo((*stack, *members[0].shape), members[0].dtype)

    def _info_of_member(self, mapping: TensorMapping) -> TensorInfo:
        info, packed, theirs = self._info(mapping.theirs), mapping.packed, mapping.theirs
        leading = self._leading_shapes.get(theirs, ())
        if info.shape[: len(leading)] != leading:
            raise CheckpointError(
                f"{self._folder}: {theirs} has shape {list(info.shape)}, the config makes it begin with "
                f"{list(leading)}; its config and its weights disagree"
            )
        shape = self._matrix_shape(mapping)
        if packed is None:
            return TensorInfo(shape, info.dtype)
        expected = sum(run.rows for run in packed.runs(self.config, shape[0]))
        if shape[0] != expected:
            raise CheckpointError(
                f"{self._folder}: {theirs} has {shape[0]} rows, the config makes it {expected}; its config and its "
                "weights disagree"
            )
        return TensorInfo((packed.num_rows(self.config, shape[0]), *shape[1:]), info.dtype)

    def _compare_head(self) -> None:
        """Under a tied config: a head of its own in the files counts, as in transformers 5; a copy is left out."""
        prefix, head = self.family.prefix, self._head_name()
        embedding = next(rule.theirs for rule in self.family.rules if rule.ours == EMBEDDING)
        embedding = next(
            (name for name in (embedding, embedding.removeprefix(prefix)) if name in self._stored), embedding
        )
        if head not in self._stored:
            return
        if embedding not in self._stored:
            announce(f"{self._folder}: no {embedding}; the embedding is {head}, which the config ties to it")
            self._embedding_is_head = True
            return
        different = first_different_row(self._stored[head], self._stored[embedding])
        if different is None:
            self._left_out[head] = f"equal to {embedding}, which the config ties to it"
            return
        announce(
            f"{self._folder}: config.json says tie_word_embeddings=true, but {head} differs from {embedding}, first in "
            f"row {different}; it is read as a head of its own"
        )
        self.config = self.config.model_copy(update={"tie_word_embeddings": False})

    def _head_name(self) -> str:
        """Their name of the head; families without one of their own would keep it under this one."""
        return next((rule.theirs for rule in self.family.rules if rule.tied), "lm_head.weight")

    def _predicted_layer(self, name: str) -> str | None:
        """Say why a tensor is left out that belongs to a layer after the last, if the config has such layers."""
        count = self.hf_config.get(PREDICTED_LAYERS) if PREDICTED_LAYERS in self.family.unused else None
        found = re.match(r"model\.layers\.(\d+)\.", name)
        if found is None or type(count) is not int:
            return None
        is_one = 0 <= int(found[1]) - self.config.num_layers < count
        return f"of a layer that predicts a further token ({PREDICTED_LAYERS}={count})" if is_one else None

    def _check_names(self) -> None:
        """Every tensor of the model is there, and none that we would drop unseen."""
        wanted = {mapping.theirs for mappings in self._mappings.values() for mapping in mappings}
        extra = []
        for name in sorted(set(self._stored) - wanted - set(self._left_out)):
            reason = self._predicted_layer(name) or derived_reason(
                name, self._stored[name], self.config, self._folder
            )
            if reason is None:
                extra.append(name)
            else:
                self._left_out[name] = reason
        check_names(self._folder, self.family, self.config, sorted(wanted - set(self._stored)), extra)
