"""Low-rank adapters inside a model (Hu et al., 2021, LoRA): `W x + scale B A x`, of which only A and B are trained.

peft wraps a layer in another module, which renames its weight and hides the layer from what cuts it over devices.
Here the layer itself holds A and B, so that names, checkpoints and tensor parallelism stay as they are; the file that
is saved is peft's (`weights.adapters.lora`).

Shapes: I input and O output size of a layer (their shares under tensor parallel), r rank.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.models.dropout import BEFORE_ADAPTER, DropoutMasks

if TYPE_CHECKING:
    from ascendspeed_core.models.transformer import Transformer

HALVES = ("lora_A", "lora_B")
"""The two small matrices of a layer: [r, I] and [O, r]."""


@dataclass(frozen=True)
class LowRank:
    """What is added to one linear layer.

    Attributes:
        rank: r.
        scale: factor of B A.
        dropout: share of its input that is set to zero in training.
    """

    rank: int
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True)
class AdapterPlan:
    """Which tensors of a model are trained.

    Attributes:
        layers: linear layers with an adapter, by name: `layers.17.attention.q_proj`.
        trained: tensors that are trained whole, such as `embedding.weight`.
    """

    layers: Mapping[str, LowRank]
    trained: frozenset[str]

    def shapes(self, whole: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all A and B, given those of the model's tensors."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, low_rank in self.layers.items():
            out, into = whole[f"{layer}.weight"]
            shapes[f"{layer}.lora_A.weight"] = (low_rank.rank, into)
            shapes[f"{layer}.lora_B.weight"] = (out, low_rank.rank)
        return shapes

    def is_trained(self, name: str) -> bool:
        """Whether a parameter is trained."""
        return name in self.trained or name.rpartition(".")[0].endswith(HALVES)


class LoraLinear(nn.Linear):
    """A linear layer with A and B beside its weight.

    Args:
        linear: takes its place; on the meta device.
        low_rank: rank, scale and dropout.
        place: of the layer among those that drop.
    """

    def __init__(self, linear: nn.Linear, low_rank: LowRank, place: int = 0) -> None:
        placed = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, **placed)
        self.lora_A = nn.Linear(linear.in_features, low_rank.rank, bias=False, **placed)
        self.lora_B = nn.Linear(low_rank.rank, linear.out_features, bias=False, **placed)
        self.scale, self.dropout, self._place = low_rank.scale, low_rank.dropout, place
        self.first_column = 0
        """Of this device's columns in the whole input, where a layer is cut by columns."""

    def low_rank(self, x: torch.Tensor, draws: DropoutMasks | None) -> torch.Tensor:
        """Return what the adapter adds: [..., I] -> [..., O]."""
        if draws is not None and self.dropout:
            x = draws.adapter_input(x, self._place, self.dropout, self.first_column)
        # Scaled where it is small: [..., r].
        added: torch.Tensor = self.lora_B(self.lora_A(x) * self.scale)
        return added

    def product(self, x: torch.Tensor, draws: DropoutMasks | None = None) -> torch.Tensor:
        """Return the result without the bias: [..., I] -> [..., O].

        Of a row-parallel layer this is a share of a sum, the adapter's part too: A is cut like the weight, and B A x
        is linear in A x. So one collective adds up both.
        """
        return F.linear(x, self.weight) + self.low_rank(x, draws)

    def forward(self, x: torch.Tensor, draws: DropoutMasks | None = None) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        return F.linear(x, self.weight, self.bias) + self.low_rank(x, draws)


def apply_linear(linear: nn.Module, x: torch.Tensor, draws: DropoutMasks | None) -> torch.Tensor:
    """Apply a linear layer, and what is dropped before its adapter if it has one: [..., I] -> [..., O]."""
    out: torch.Tensor = linear(x, draws) if isinstance(linear, LoraLinear) else linear(x)
    return out


def add_adapters(model: "Transformer", plan: AdapterPlan) -> None:
    """Give the layers of this process their adapters, in place; on the meta device, before anything is cut."""
    model.adapters = plan
    modules = dict(model.named_modules())
    for name, low_rank in plan.layers.items():
        linear = modules.get(name)
        if linear is not None:
            assert isinstance(linear, nn.Linear)
            owner, _, attribute = name.rpartition(".")
            setattr(modules[owner], attribute, LoraLinear(linear, low_rank, BEFORE_ADAPTER.get(attribute, 0)))
    model.tie_weights()


def freeze(model: "Transformer") -> None:
    """Leave gradients to what the model's plan trains; weights without get neither gradient nor optimizer state."""
    if model.adapters is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(model.adapters.is_trained(name))


@contextmanager
def adapters_off(model: "Transformer") -> Iterator[None]:
    """Let `model` compute as its base does; what is trained whole stays as it is."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    scales = [layer.scale for layer in layers]
    try:
        for layer in layers:
            layer.scale = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scale = scale
