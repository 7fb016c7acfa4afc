"""Read a Hugging Face folder by slices: safetensors, one or several files with an index, or `.bin`."""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.models.families import Family, WeightRule, family_of_hugging_face
from ascendspeed_core.weights.files.file_tensor import StoredTensor
from ascendspeed_core.weights.files.safetensors_files import SAFETENSORS_DTYPES, read_safetensors
from ascendspeed_core.weights.files.torch_files import TorchFile, stored_tensors
from ascendspeed_core.weights.source import CheckpointError, Index, TensorInfo, inside
from ascendspeed_data.tokenizer import DEFINING_FILES


class HuggingFaceSource:
    """All weights of a Hugging Face folder under our names; nothing is read until it is asked for."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        self.path: Path | None = path
        self._folder = path
        self.hf_config = read_json(path / "config.json")
        self.family: Family = family_of_hugging_face(self.hf_config, str(path / "config.json"))
        self.config = self.family.read_config(self.hf_config | generation_ids(path))
        self._files: dict[Path, dict[str, StoredTensor]] = {}
        self._rules = self._rules_of_this_folder()
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
        return {ours: self._info_of(rule) for ours, rule in self._rules.items()}

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a slice; only its bytes leave the disk."""
        rule = self._rules[name]
        if rule.packed is None:
            return self._read(rule.theirs, index)
        rows = index[0] if index else slice(0, rule.packed.num_rows(self.config))
        places = list(rule.packed.places(self.config, rows))
        if not places:
            return self._read(rule.theirs, (slice(0, 0), *index[1:]))
        columns = index[1:] or tuple(slice(0, length) for length in self._info(rule.theirs).shape[1:])
        pieces = [self._read(rule.theirs, (place, *columns)) for place in places]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _read(self, theirs: str, index: Index) -> torch.Tensor:
        return self._open(self._places[theirs])[theirs].read(index)

    def _rules_of_this_folder(self) -> dict[str, WeightRule]:
        """The family's table by our names; a folder of a model without its head leaves the prefix out."""
        prefix = self.family.prefix
        rules = {rule.ours: rule for rule in self.family.weights(self.config)}
        if not prefix or any(name.startswith(prefix) for name in self._places):
            return rules
        return {ours: replace(rule, theirs=rule.theirs.removeprefix(prefix)) for ours, rule in rules.items()}

    @cached_property
    def _places(self) -> dict[str, Path]:
        """File of each tensor."""
        for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
            if (self._folder / index_name).is_file():
                weight_map = read_json(self._folder / index_name).get("weight_map", {})
                return {name: inside(self._folder, file) for name, file in weight_map.items()}
        for single in ("model.safetensors", "pytorch_model.bin"):
            path = self._folder / single
            if path.is_file():
                return dict.fromkeys(self._open(inside(self._folder, single)), path)
        raise CheckpointError(
            f"{self._folder} has a config.json but no weights (model.safetensors or pytorch_model.bin); "
            "download them, or name the file with --model-config to start from random weights"
        )

    def _open(self, path: Path) -> dict[str, StoredTensor]:
        if path not in self._files:
            read = read_safetensors if path.suffix == ".safetensors" else _read_pickled
            self._files[path] = read(path)
        return self._files[path]

    def _info(self, theirs: str) -> TensorInfo:
        file = self._places[theirs]
        stored = self._open(file).get(theirs)
        if stored is None:
            raise CheckpointError(f"{file} lacks {theirs}, though the index of {self._folder} names it there")
        if stored.info.dtype not in SAFETENSORS_DTYPES.values():
            raise CheckpointError(
                f"{self._folder}: {theirs} is stored as {stored.info.dtype}, which is not a format of weights"
            )
        return stored.info

    def _info_of(self, rule: WeightRule) -> TensorInfo:
        """What is known of one of our tensors."""
        info = self._info(rule.theirs)
        if rule.packed is None:
            return info
        packed = sum(block.rows for block in rule.packed.blocks(self.config))
        if info.shape[0] != packed:
            raise CheckpointError(
                f"{self._folder}: {rule.theirs} has {info.shape[0]} rows, the config makes it {packed}; its config and "
                "its weights disagree"
            )
        return TensorInfo((rule.packed.num_rows(self.config), *info.shape[1:]), info.dtype)

    def _check_names(self) -> None:
        """Every tensor of the model is there, and none that we would drop."""
        wanted = {rule.theirs for rule in self._rules.values()}
        missing = sorted(wanted - set(self._places))
        if missing:
            raise CheckpointError(f"{self._folder} lacks {len(missing)} tensors, first {missing[0]}")
        extra = sorted(name for name in set(self._places) - wanted if not self._derived(name))
        if extra:
            raise CheckpointError(
                f"{self._folder} holds {len(extra)} tensors that {self.family.name} has no place for, first {extra[0]}"
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise `CheckpointError` naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def generation_ids(folder: Path) -> dict[str, Any]:
    """Ids that end a generation stand in generation_config.json when there is one."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    values = read_json(path)
    return {key: values[key] for key in ("bos_token_id", "eos_token_id") if values.get(key) is not None}
