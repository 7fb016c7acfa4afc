"""Merge a LoRA adapter into a model of any kind, as the model is read.

W' = W + scale B A, with scale = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (Hu et al., 2021, section 4.1;
Kalajdzievski, 2023). It is computed in fp32 over fixed runs of rows, so that the result does not depend on how the
model is cut, and rounded to the model's dtype once.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights.adapters.hugging_face import hugging_face_tensors
from ascendspeed_core.weights.adapters.peft import Adapter, Update
from ascendspeed_core.weights.adapters.untied import UntiedWeights
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.native.source import TOKENIZER, find_data_manifest
from ascendspeed_core.weights.source import (
    BaseWeightSource,
    CheckpointError,
    Index,
    TensorInfo,
    WeightSource,
)
from ascendspeed_data.manifest import DatasetManifest
from ascendspeed_data.tokenizer import DEFINING_FILES


class MergedAdapter(BaseWeightSource):
    """A model with an adapter in it.

    Args:
        source: the model, of any kind.
        adapter: what is merged.
        only_saved: take only the tensors that replace the model's; what is added to others is left to the caller.

    Raises:
        CheckpointError: the adapter speaks of tensors that the model does not have.
    """

    def __init__(self, source: WeightSource, adapter: Adapter, only_saved: bool = False) -> None:
        self.kind, self.path = source.kind, source.path
        if adapter.unties:
            source = UntiedWeights(source)
        self.base: WeightSource = source
        self.adapter, self._only_saved = adapter, only_saved
        hf_tensors = hugging_face_tensors(source.config)
        self._hf_tensors = hf_tensors
        known = {hf.name for hf in hf_tensors.values()}
        for module in adapter.updates:
            if f"{module}.weight" not in known:
                raise CheckpointError(
                    f"{adapter.folder} changes {module}, which {source.path} ({source.config.family}) does not have"
                )
        for name in adapter.saved:
            if name not in known:
                raise CheckpointError(f"{adapter.folder} replaces {name}, which {source.path} does not have")
        self.config: ModelConfig = self._resized(source.config)
        self._check_shapes()

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer: the adapter's own, or its run's, which may have more pieces, or else the model's."""
        folder = self.adapter.folder
        for candidate in (folder, folder.parent / TOKENIZER):
            if any((candidate / name).is_file() for name in DEFINING_FILES):
                return candidate
        return self.base.tokenizer

    @property
    def data_manifest(self) -> DatasetManifest | None:
        """Manifest of the data that the adapter was trained on, or else the model."""
        return find_data_manifest(self.adapter.folder) or self.base.data_manifest

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by our name."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        tensors = dict(self.base.tensors())
        for name, hf in self._hf_tensors.items():
            saved = self.adapter.saved.get(hf.name)
            if saved is not None and hf.rows is None:
                tensors[name] = TensorInfo(tuple(saved.shape), tensors[name].dtype)
        return tensors

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a tensor or a slice of it."""
        info, hf = self.tensors()[name], self._hf_tensors.get(name)
        if hf is None:
            return self.base.read(name, index)
        index = index or tuple(slice(0, length) for length in info.shape)
        saved = self.adapter.saved.get(hf.name)
        if saved is None:
            base = self.base.read(name, index)
        else:
            base = (saved if hf.rows is None else saved[hf.rows])[index].to(info.dtype)
        update = self.adapter.updates.get(hf.name.removesuffix(".weight"))
        if update is None or self._only_saved or not hf.name.endswith(".weight"):
            return base
        return (base.float() + self._added(update, hf.rows, index)).to(base.dtype)

    def _added(self, update: Update, rows: torch.Tensor | None, index: Index) -> torch.Tensor:
        if rows is None:
            return update.rows(index[0].start, index[0].stop)[:, index[1]]
        wanted = rows[index[0]]
        first, last = int(wanted.min()), int(wanted.max()) + 1
        return update.rows(first, last)[wanted - first][:, index[1]]

    def _resized(self, config: ModelConfig) -> ModelConfig:
        """Return the config with the vocabulary that saved embeddings have."""
        saved = self.adapter.saved.get(self._hf_tensors["embedding.weight"].name)
        if saved is None or saved.shape[0] == config.vocab_size:
            return config
        head = self._hf_tensors.get("output_head.weight")
        if head is not None and head.name not in self.adapter.saved:
            raise CheckpointError(
                f"{self.adapter.folder} has an embedding of {saved.shape[0]:,} ids but no "
                f"{head.name}; it is incomplete"
            )
        return config.model_copy(update={"vocab_size": saved.shape[0]})

    def _check_shapes(self) -> None:
        shapes = parameter_shapes(self.config)
        sizes: dict[str, int] = {}
        for name, hf in self._hf_tensors.items():
            sizes[hf.name] = sizes.get(hf.name, 0) + shapes[name][0]
        for name, hf in self._hf_tensors.items():
            expected = (sizes[hf.name], *shapes[name][1:])
            update = self.adapter.updates.get(hf.name.removesuffix(".weight"))
            saved = self.adapter.saved.get(hf.name)
            found = [] if saved is None else [tuple(saved.shape)]
            if update is not None and hf.name.endswith(".weight"):
                found.append(update.shape)
            for shape in found:
                if shape != expected:
                    raise CheckpointError(
                        f"{self.adapter.folder}: {hf.name} is changed with shape {list(shape)}, the model's is "
                        f"{list(expected)}; the adapter is of another model"
                    )
