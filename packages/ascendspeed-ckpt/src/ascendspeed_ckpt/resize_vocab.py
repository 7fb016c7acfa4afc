"""Resize the vocabulary of a model as it is read."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights import BaseWeightSource, Index, TensorInfo, WeightSource
from ascendspeed_core.weights.stream import slabs
from ascendspeed_data.command_line import log
from ascendspeed_data.tokenizer import Tokenizer

VOCABULARY = ("embedding.weight", "output_head.weight")


class ResizedVocabulary(BaseWeightSource):
    """A model with a larger or smaller vocabulary.

    Rows of ids that are new are the mean of all old rows, computed in float64: a new token begins as the average token
    does, so that its logit is the average logit and the loss of old texts hardly moves (Hewitt, 2021).

    Args:
        source: the model.
        vocab_size: ids that it is to have.
        tokenizer: what goes along from now on.
    """

    def __init__(self, source: WeightSource, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
        self.kind, self.path = source.kind, source.path
        self.base: WeightSource = source
        self._tokenizer = None if tokenizer is None else tokenizer.path
        self._old = source.config.vocab_size
        changed = {} if tokenizer is None else _begin_and_end(source.config, tokenizer)
        self.config: ModelConfig = source.config.model_copy(update={"vocab_size": vocab_size, **changed})

    @property
    def tokenizer(self) -> Path | None:
        """Folder of the tokenizer."""
        return self._tokenizer or self.base.tokenizer

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by our name."""
        return self._infos

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        size = self.config.vocab_size
        return {
            name: TensorInfo((size, *info.shape[1:]), info.dtype) if name in VOCABULARY else info
            for name, info in self.base.tensors().items()
        }

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a tensor or a slice of it."""
        if name not in VOCABULARY:
            return self.base.read(name, index)
        shape = self.tensors()[name].shape
        rows, columns = index or tuple(slice(0, length) for length in shape)
        kept = slice(min(rows.start, self._old), min(rows.stop, self._old))
        old = self.base.read(name, (kept, columns))
        num_new = rows.stop - max(rows.start, self._old)
        if num_new <= 0:
            return old
        new = self._means[name][columns].to(old.dtype).expand(num_new, -1)
        return torch.cat([old, new]) if old.numel() else new

    @cached_property
    def _means(self) -> dict[str, torch.Tensor]:
        """Mean row of each tensor of the vocabulary, [H] in float64."""
        means = {}
        for name, info in self.base.tensors().items():
            if name in VOCABULARY:
                total = torch.zeros(info.shape[1:], dtype=torch.float64)
                for slab in slabs(self.base, name, tuple(slice(0, length) for length in info.shape)):
                    total += slab.double().sum(0)
                means[name] = total / info.shape[0]
        return means


def _begin_and_end(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the ids that begin and end a text: the model's that are special in the tokenizer, and its own."""
    special = set(tokenizer.special_ids.values())
    ends = [number for number in config.eos_token_ids if number in special or number == tokenizer.eos_id]
    if tokenizer.eos_id is not None and tokenizer.eos_id not in ends:
        ends.append(tokenizer.eos_id)
    begin = config.bos_token_id if config.bos_token_id in {None, *special} else tokenizer.bos_id
    changed = {"bos_token_id": begin, "eos_token_ids": tuple(ends)}
    for name, value in changed.items():
        if value != getattr(config, name):
            log(f"{name}: {getattr(config, name)} -> {value}, by the tokenizer {tokenizer.path}")
    return changed
