"""Low-rank adapters inside a model (Hu et al., 2021, LoRA): `W x + scale B A x`, of which only A and B are trained.

peft wraps a layer in another module, which renames its weight and hides the layer from what cuts it over ranks.
Here the layer itself holds A and B, so that names, checkpoints and tensor parallelism stay as they are; the file that
is saved is peft's (`weights.adapters.lora`).

Shapes: I input and O output size of a layer (their shares under tensor parallel), r rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
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
        names: of the adapters, where several are stacked in each layer.
        stacks: by layer, rank and scale of each of them; rank 0 where one leaves the layer as it is.
    """

    layers: Mapping[str, LowRank]
    trained: frozenset[str]
    names: tuple[str, ...] = ()
    stacks: Mapping[str, tuple[LowRank, ...]] = field(default_factory=dict)

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


class AdapterRows:
    """Chooses which of several stacked adapters each token of a pass uses.

    Args:
        model: this rank's part of a model with stacked adapters.
    """

    def __init__(self, model: "Transformer") -> None:
        plan = model.adapters
        assert plan is not None
        self.names = plan.names
        self._layers: dict[tuple[LowRank, ...], list[LoraLinear]] = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraLinear):
                self._layers.setdefault(plan.stacks[name], []).append(module)
        self._tables: dict[tuple[LowRank, ...], torch.Tensor] = {}

    def choose(self, rows: Sequence[int | None]) -> None:
        """Let the tokens of the next pass, in order, use the adapters of these numbers; `None` is the model alone."""
        for stack, layers in self._layers.items():
            table = self._tables.get(stack)
            if table is None:
                table = self._tables[stack] = _factors(stack, layers[0].weight)
            # The last row, number -1, is all zeros.
            numbers = torch.tensor([-1 if one is None else one for one in rows], device=table.device)
            factors = table[numbers]
            for layer in layers:
                layer.scale = factors


def _factors(stack: Sequence[LowRank], like: torch.Tensor) -> torch.Tensor:
    """Return the factors of the rows of A for each adapter and for none, [adapters + 1, r]."""
    table = torch.zeros(len(stack) + 1, sum(one.rank for one in stack), dtype=torch.float64)
    start = 0
    for number, one in enumerate(stack):
        table[number, start : start + one.rank] = one.scale
        start += one.rank
    return table.to(like.device, torch.promote_types(like.dtype, torch.float32))
