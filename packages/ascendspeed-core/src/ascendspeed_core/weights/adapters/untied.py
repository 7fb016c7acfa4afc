"""A model whose head shares the embedding's weight, as one that has both."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from ascendspeed_core.weights.external.name_maps import EMBEDDING, HEAD
from ascendspeed_core.weights.source import BaseWeightSource, Index, TensorInfo, WeightSource


class UntiedWeights(BaseWeightSource):
    """The weights of a tied model, whose head is a copy of its embedding.

    Args:
        source: the tied model.
    """

    def __init__(self, source: WeightSource) -> None:
        self.kind, self.path = source.kind, source.path
        self.base: WeightSource = source
        self.config = source.config.model_copy(update={"tie_word_embeddings": False})

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer that came with the weights, if any."""
        return self.base.tokenizer

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by our name."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        tensors = dict(self.base.tensors())
        return {**tensors, HEAD: tensors[EMBEDDING]}

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a tensor or a slice of it."""
        return self.base.read(EMBEDDING if name == HEAD else name, index)
