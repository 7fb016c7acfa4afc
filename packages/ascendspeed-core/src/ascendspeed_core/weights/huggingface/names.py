"""A model's weights under the names and in the packing of a Hugging Face folder."""

from collections.abc import Mapping

import torch

from ascendspeed_core.models.families import WeightRule, find_family
from ascendspeed_core.weights.source import Index, TensorInfo, WeightSource


class HuggingFaceNames:
    """Gives any slice of any tensor of a folder that is to be written.

    Args:
        source: the weights under our names.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source, self._config = source, source.config
        self._infos: dict[str, TensorInfo] | None = None
        self._rules: dict[str, list[WeightRule]] = {}
        for rule in find_family(source.config.family).weights(source.config):
            self._rules.setdefault(rule.theirs, []).append(rule)

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by their name, in the order of the family's table."""
        if self._infos is not None:
            return self._infos
        ours = self._source.tensors()
        found = {}
        for theirs, rules in self._rules.items():
            parts = [ours[rule.ours] for rule in rules]
            rows = sum(part.shape[0] for part in parts)
            found[theirs] = TensorInfo((rows, *parts[0].shape[1:]), parts[0].dtype)
        self._infos = found
        return found

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Read a tensor or a slice of it."""
        rules = self._rules[name]
        packed = rules[0].packed
        if packed is None:
            return self._source.read(rules[0].ours, index)
        by_part = {rule.packed.part: rule.ours for rule in rules if rule.packed is not None}
        shape = self.tensors()[name].shape
        whole = index or tuple(slice(0, length) for length in shape)
        pieces = [
            self._source.read(by_part[part], (rows, *whole[1:]))
            for part, rows in packed.contents(self._config, whole[0])
        ]
        return torch.cat(pieces) if pieces else torch.empty(0, *shape[1:])
