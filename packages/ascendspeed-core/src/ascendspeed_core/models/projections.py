"""Linear layers that read the same input: one matrix product each, or one for all of them.

Joined layers stay layers of their own, with their names, parameters and gradients; only their storage lies in one
piece, so that one product over all rows gives all results. Checkpoints, optimizer and tensor parallelism see nothing
of it.

Shapes: H input size, R_i output size of layer i (its share under tensor parallel), R their sum.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.models.dropout import DropoutMasks
from ascendspeed_core.models.int8 import Int8Weight, join
from ascendspeed_core.models.linear import LoraLinear, apply_linear


class Projections:
    """The named linear layers of a module; not a module, so that it adds no name.

    Args:
        owner: the module that holds the layers.
        names: attributes of it.
    """

    def __init__(self, owner: nn.Module, names: tuple[str, ...]) -> None:
        self._owner, self._names = owner, names
        self.weight: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self._rows: list[int] = []
        self._has_adapters = False

    def __call__(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None) -> list[torch.Tensor]:
        """Apply every layer: [..., H] -> [..., R_i] each; `dropout_masks` drop from what adapters read."""
        if self.weight is None:
            return [apply_linear(layer, x, dropout_masks) for layer in self.layers]
        parts = list(self._product(x, self.weight).split(self._rows, dim=-1))
        if not self._has_adapters:
            return parts
        return [
            part + layer.low_rank(x, dropout_masks) if isinstance(layer, LoraLinear) else part
            for layer, part in zip(self.layers, parts, strict=True)
        ]

    def in_one_piece(self, x: torch.Tensor) -> torch.Tensor | None:
        """Apply every layer and leave the results side by side: [..., H] -> [..., R].

        Returns:
            `None` where layers are not joined, or adapters add to their results.
        """
        return None if self.weight is None or self._has_adapters else self._product(x, self.weight)

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, weight, self._bias)
        layers = self.layers
        parameters: list[torch.Tensor] = [layer.weight for layer in layers]
        parameters += [layer.bias for layer in layers if self._bias is not None]
        joined: torch.Tensor = _JoinedLinear.apply(x, weight, self._bias, *parameters)
        return joined

    def join(self) -> None:
        """Lay the layers' parameters into one piece each of weights and biases; their values stay.

        Called when the parameters have their final storage; whoever replaces that calls it again.
        """
        layers = self._layers_to_join()
        self.weight = _lay_together([layer.weight for layer in layers])
        self._bias = None
        if layers[0].bias is not None:
            self._bias = _lay_together([layer.bias for layer in layers])

    def make_joined(self, device: torch.device) -> None:
        """Give the layers' parameters, which have no storage yet, one piece each of weights and biases.

        As `join`, with nothing to copy: no layer is there twice.
        """
        layers = self._layers_to_join()
        self.weight = _made_together(layers, "weight", device)
        self._bias = None if layers[0].bias is None else _made_together(layers, "bias", device)

    def _layers_to_join(self) -> list[nn.Linear]:
        """Return the layers, and keep what each product would else have to ask them: in Python that takes long."""
        layers = self.layers
        self._rows = [layer.weight.shape[0] for layer in layers]
        self._has_adapters = any(isinstance(layer, LoraLinear) for layer in layers)
        return layers

    @property
    def layers(self) -> list[nn.Linear]:
        """The layers, in order."""
        return [getattr(self._owner, name) for name in self._names]


def join_projections(model: nn.Module) -> None:
    """Make one matrix product of layers that read the same input, in every module that has such layers."""
    for module in model.modules():
        projections = getattr(module, "projections", None)
        if isinstance(projections, Projections):
            projections.join()


def make_joined_projections(model: nn.Module, device: torch.device) -> None:
    """Do what `join_projections` does for a model without storage: the layers concerned get theirs, not yet filled."""
    for module in model.modules():
        projections = getattr(module, "projections", None)
        if isinstance(projections, Projections):
            projections.make_joined(device)


def _made_together(layers: Sequence[nn.Linear], kind: str, device: torch.device) -> torch.Tensor:
    empty: list[nn.Parameter] = [getattr(layer, kind) for layer in layers]
    rows = [parameter.shape[0] for parameter in empty]
    together = torch.empty(sum(rows), *empty[0].shape[1:], dtype=empty[0].dtype, device=device)
    for layer, parameter, part in zip(layers, empty, together.split(rows), strict=True):
        setattr(layer, kind, nn.Parameter(part, requires_grad=parameter.requires_grad))
    return together


def _lay_together(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    int8 = [parameter for parameter in parameters if isinstance(parameter, Int8Weight)]
    if int8:
        return join(int8)
    together = torch.cat([parameter.detach() for parameter in parameters])
    start = 0
    for parameter in parameters:
        end = start + parameter.shape[0]
        parameter.data = together[start:end]
        start = end
    return together


class _JoinedLinear(torch.autograd.Function):
    """`x @ weight.T + bias`; the gradients go to the parameters whose storage `weight` and `bias` are."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        count = len(parameters) // (2 if bias is not None else 1)
        ctx.rows = [parameter.shape[0] for parameter in parameters[:count]]
        ctx.has_bias = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0]
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[3:]
        if not any(wanted):
            return of_x, None, None, *(None for _ in wanted)
        flat = gradient.flatten(0, -2)
        of_parameters = list((flat.T @ x.flatten(0, -2)).split(ctx.rows))
        if ctx.has_bias:
            of_parameters += flat.sum(0).split(ctx.rows)
        return of_x, None, None, *(g if w else None for g, w in zip(of_parameters, wanted, strict=True))
