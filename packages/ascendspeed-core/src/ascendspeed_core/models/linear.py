"""Linear layers, with a low-rank adapter (Hu et al., 2021, LoRA) beside the weight or without.

Shapes: I input and O output size of a layer (their shares under tensor parallel), r rank.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.models.dropout import DropoutMasks

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


class LoraLinear(nn.Linear):
    """A linear layer with A and B beside its weight.

    Args:
        linear: the layer that this one replaces; on the meta device.
        low_rank: rank, scale and dropout.
        dropout_site: which mask its input gets, see `dropout.BEFORE_ADAPTER`.
    """

    def __init__(self, linear: nn.Linear, low_rank: LowRank, dropout_site: int = 0) -> None:
        placed = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, **placed)
        self.lora_A = nn.Linear(linear.in_features, low_rank.rank, bias=False, **placed)
        self.lora_B = nn.Linear(low_rank.rank, linear.out_features, bias=False, **placed)
        self.scale: float | torch.Tensor = low_rank.scale
        """Factor of B A; of stacked adapters one for each token and row of A, [M, r], see `lora.AdapterRows`."""
        self.dropout, self._dropout_site = low_rank.dropout, dropout_site
        self.first_column = 0
        """Of this rank's columns in the whole input, where a layer is cut by columns."""

    def low_rank(self, x: torch.Tensor, dropout_masks: DropoutMasks | None) -> torch.Tensor:
        """Return what the adapter adds: [..., I] -> [..., O]."""
        if dropout_masks is not None and self.dropout:
            x = dropout_masks.adapter_input(x, self._dropout_site, self.dropout, self.first_column)
        # Scaled where it is small: [..., r]. A tensor of factors may be wider than what it multiplies.
        added: torch.Tensor = self.lora_B((self.lora_A(x) * self.scale).to(x.dtype))
        return added

    def product(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None) -> torch.Tensor:
        """Return the result without the bias: [..., I] -> [..., O].

        Of a row-parallel layer this is a share of a sum, the adapter's part too: A is cut like the weight, and B A x
        is linear in A x. So one collective adds up both.
        """
        return F.linear(x, self.weight) + self.low_rank(x, dropout_masks)

    def forward(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        return F.linear(x, self.weight, self.bias) + self.low_rank(x, dropout_masks)


def apply_linear(linear: nn.Module, x: torch.Tensor, dropout_masks: DropoutMasks | None) -> torch.Tensor:
    """Apply a linear layer, and what is dropped before its adapter if it has one: [..., I] -> [..., O]."""
    out: torch.Tensor = linear(x, dropout_masks) if isinstance(linear, LoraLinear) else linear(x)
    return out
