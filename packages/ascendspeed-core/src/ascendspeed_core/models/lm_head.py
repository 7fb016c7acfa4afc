"""From hidden states to logits.

Shapes: H hidden size, V vocabulary (V/tp on each rank under tensor parallelism).
"""

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.int8 import Int8Weight
from ascendspeed_core.models.linear import LoraLinear


class NormalisedHead(nn.Linear):
    """Logits are the cosine between hidden state and weight row, times the hidden state's length (Baichuan 2).

    The published code divides the weight by the lengths of its rows; dividing the logits is the same and needs
    neither a second weight nor its gradient.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)
        self._kept: tuple[int, int, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., V]."""
        return F.linear(x, self.weight) / self.lengths().to(x.dtype)

    def lengths(self) -> torch.Tensor:
        """Length of each row, [V], fp32 or float64; kept while no gradient is wanted and the weight is unchanged."""
        weight = self.weight
        held = weight.integers if isinstance(weight, Int8Weight) else weight
        state = (held.data_ptr(), held._version)
        if torch.is_grad_enabled():
            # An update may follow, which fused optimizers and DeepSpeed do without counting it as a new version.
            self._kept = None
        if self._kept is not None and self._kept[:2] == state:
            return self._kept[2]
        if isinstance(weight, Int8Weight):
            lengths = weight.row_lengths().clamp_min(1e-12)
        else:
            wide = weight if weight.dtype == torch.float64 else weight.float()
            lengths = wide.square().sum(-1).sqrt().clamp_min(1e-12)
        if not torch.is_grad_enabled():
            self._kept = (*state, lengths)
        return lengths


def head_matrix(head: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what hidden states are multiplied with, [V, H], and what the products are divided by, [V] or nothing."""
    if isinstance(head, NormalisedHead):
        return head.weight, head.lengths()
    if isinstance(head, LoraLinear):
        return head.weight + head.lora_B.weight @ head.lora_A.weight * head.scale, None
    return head.weight, None


def make_head(config: ModelConfig) -> nn.Linear:
    """Return the output head that the config asks for."""
    if config.normalised_head:
        return NormalisedHead(config.hidden_size, config.vocab_size)
    return nn.Linear(config.hidden_size, config.vocab_size, bias=False)
