"""Read a Hugging Face folder by slices: safetensors, one or several files with an index, or `.bin`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from pydantic import BaseModel

from ascendspeed_core.models.families import Family, TensorMapping, family_of_hugging_face
from ascendspeed_core.models.families.base import leading_shape
from ascendspeed_core.weights.files.file_tensor import StoredTensor
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.files.safetensors_files import SAFETENSORS_DTYPES, read_safetensors
from ascendspeed_core.weights.files.torch_files import TorchFile, stored_tensors
from ascendspeed_core.weights.huggingface.config import generation_ids
from ascendspeed_core.weights.source import BaseWeightSource, CheckpointError, Index, TensorInfo, inside
from ascendspeed_data.tokenizer import DEFINING_FILES


class _WeightIndex(BaseModel):
    """`model.safetensors.index.json`: the file of each tensor, by name; totals beside it are not read."""

    weight_map: dict[str, str]


class HuggingFaceSource(BaseWeightSource):
    """All weights of a Hugging Face folder under our names; nothing is read until it is asked for."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self._folder = path
        self.hf_config = read_json(path / "config.json")
        self.family: Family = family_of_hugging_face(self.hf_config, str(path / "config.json"))
        self.config = self.family.read_config(self.hf_config | generation_ids(path))
        self._opened: dict[Path, dict[str, StoredTensor]] = {}
        self._mappings = self._mappings_of_this_folder()
        self._leading_shapes = self._leading_shapes_of_fused()
        self._check_names()

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
        found = self._read(mapping.theirs, (*position, *(reversed(index) if is_swapped else index)))
        found = found.reshape(found.shape[len(position) :])
        return found.T if is_swapped else found

    def _matrix_shape(self, mapping: TensorMapping) -> tuple[int, ...]:
        """Shape of one matrix of their tensor in our orientation, whatever is packed in it."""
        shape = self._info(mapping.theirs).shape[len(mapping.their_position) :]
        return shape[::-1] if mapping.transposed and len(shape) == 2 else shape

    def _read(self, theirs: str, index: Index) -> torch.Tensor:
        return self._open(self._file_of_tensor[theirs])[theirs].read(index)

    def _mappings_of_this_folder(self) -> dict[str, list[TensorMapping]]:
        """The family's table by our names; a folder of a model without its head leaves the prefix out."""
        prefix = self.family.prefix
        has_prefix = not prefix or any(name.startswith(prefix) for name in self._file_of_tensor)
        found: dict[str, list[TensorMapping]] = {}
        for mapping in self.family.weights(self.config):
            theirs = mapping.theirs if has_prefix else mapping.theirs.removeprefix(prefix)
            found.setdefault(mapping.ours, []).append(replace(mapping, theirs=theirs))
        return found

    def _leading_shapes_of_fused(self) -> dict[str, tuple[int, ...]]:
        """Leading dimensions that the family's table gives their fused tensors."""
        positions: dict[str, list[tuple[int, ...]]] = {}
        for mapping in (mapping for mappings in self._mappings.values() for mapping in mappings):
            if mapping.their_position:
                positions.setdefault(mapping.theirs, []).append(mapping.their_position)
        return {theirs: leading_shape(found) for theirs, found in positions.items()}

    @cached_property
    def _file_of_tensor(self) -> dict[str, Path]:
        """File of each tensor."""
        for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if (self._folder / index_name).is_file():
                index = read_json(self._folder / index_name, _WeightIndex)
                return {name: inside(self._folder, file) for name, file in index.weight_map.items()}
        for single in ("model.safetensors", "pytorch_model.bin"):
            path = self._folder / single
            if path.is_file():
                return dict.fromkeys(self._open(inside(self._folder, single)), path)
        raise CheckpointError(
            f"{self._folder} has a config.json but no weights (model.safetensors or pytorch_model.bin); "
            "download them, or name the file with --model-config to start from random weights"
        )

    def _open(self, path: Path) -> dict[str, StoredTensor]:
        if path not in self._opened:
            read = read_safetensors if path.suffix == ".safetensors" else _read_pickled
            self._opened[path] = read(path)
        return self._opened[path]

    def _info(self, theirs: str) -> TensorInfo:
        file = self._file_of_tensor[theirs]
        stored = self._open(file).get(theirs)
        if stored is None:
            raise CheckpointError(f"{file} lacks {theirs}, though the index of {self._folder} names it there")
        if stored.info.dtype not in SAFETENSORS_DTYPES.values():
            raise CheckpointError(
                f"{self._folder}: {theirs} is stored as {stored.info.dtype}, which is not a format of weights"
            )
        return stored.info

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

    def _check_names(self) -> None:
        """Every tensor of the model is there, and none that we would drop."""
        wanted = {mapping.theirs for mappings in self._mappings.values() for mapping in mappings}
        missing = sorted(wanted - set(self._file_of_tensor))
        if missing:
            raise CheckpointError(f"{self._folder} lacks {len(missing)} tensors, first {missing[0]}")
        extra = sorted(name for name in set(self._file_of_tensor) - wanted if not self._derived(name))
        if extra:
            raise CheckpointError(
                f"{self._folder} holds {len(extra)} tensors that {self.family.name} does not have, first {extra[0]}"
            )

    def _derived(self, name: str) -> bool:
        """Tell tensors that repeat what the config or another tensor says."""
        return name.endswith("rotary_emb.inv_freq") or (
            self.config.tie_word_embeddings and name == "lm_head.weight"
        )


def _read_pickled(path: Path) -> dict[str, StoredTensor]:
    """Open a `.bin` file, whose tensors stay in it.

    Raises:
        CheckpointError: it is damaged, or of torch before 1.6, which wrote another format.
    """
    content = TorchFile(path).content
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no dictionary of tensors")
    found = dict(stored_tensors(content))
    if len(found) != len(content):
        other = min(str(key) for key in content if key not in found)
        raise CheckpointError(f"{path} holds {other}, which is no tensor")
    return found
