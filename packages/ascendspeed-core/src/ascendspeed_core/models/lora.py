"""Low-rank adapters inside a model (Hu et al., 2021, LoRA): `W x + scale B A x`, of which only A and B are trained.

peft wraps a layer in another module, which renames its weight and hides the layer from what cuts it over ranks.
Here the layer itself holds A and B, so that names, checkpoints and tensor parallelism stay as they are; the file that
is saved is peft's (`weights.adapters.lora`).

Shapes: I input and O output size of a layer (their shares under tensor parallel), r rank.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ascendspeed_core.models.dropout import BEFORE_ADAPTER
from ascendspeed_core.models.linear import HALVES, LoraLinear, LowRank

if TYPE_CHECKING:
    from ascendspeed_core.models.transformer import Transformer


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
