"""Random weights that do not depend on the layout: each tensor is drawn whole from its own seed, then cut."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import is_output_projection
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_core.weights.source import BaseWeightSource, Index, TensorInfo


class InitialWeights(BaseWeightSource):
    """Weights of a model that has not been trained.

    Matrices are normal with the config's `initializer_range`, divided by sqrt(2 L) where they write into the
    residual stream (Radford et al., 2019, GPT-2, section 2.3); norm weights are 1, or 0 where norms add
    1 to them, biases and sinks 0. All are drawn in fp32.
    """

    kind = "random"
    path: Path | None = None

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self._shapes = parameter_shapes(config)
        self._infos = {name: TensorInfo(shape, torch.float32) for name, shape in self._shapes.items()}
        self._drawn: tuple[str, torch.Tensor] | None = None

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Return every tensor by our name."""
        return self._infos

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        """Draw the whole tensor and return a slice of it; kept until another is asked for, or its last rows."""
        shape = self._shapes[name]
        if name.endswith((".bias", ".logits_bias", ".sinks.weight")):
            return torch.zeros(shape)[index]
        if len(shape) == 1 or name.endswith("_norm.weight"):
            return torch.full(shape, 0.0 if self.config.norm_unit_offset else 1.0)[index]
        name_drawn, drawn = self._drawn or ("", None)
        if drawn is None or name_drawn != name:
            self._drawn = None
            drawn = self._draw(name)
        is_last = not index or index[0].stop == shape[0]
        self._drawn = None if is_last else (name, drawn)
        # A copy: what is kept is not to be written to.
        return drawn[index].clone() if index else drawn

    def _draw(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed_of(self.seed, name))
        spread = self.config.initializer_range
        if is_output_projection(name):
            spread /= (2 * self.config.num_layers) ** 0.5
        return torch.empty(self._shapes[name]).normal_(0.0, spread, generator=generator)


def seed_of(seed: int, name: str) -> int:
    """Return the seed of one tensor."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
