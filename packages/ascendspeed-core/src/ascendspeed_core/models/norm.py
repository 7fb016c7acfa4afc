"""Normalisation layers.

Shapes: B batch, S sequence, H hidden size.
"""

import torch
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.kernels.reference import LayerNormFunction, RMSNormFunction, layer_norm, rms_norm


class RMSNorm(nn.Module):
    """`rms_norm` with its weight."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon
        self.normalise: RMSNormFunction = rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return self.normalise(x, self.weight, self.epsilon)


class LayerNorm(nn.LayerNorm):
    """`layer_norm` with its weight and bias."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__(size, eps=epsilon)
        self.normalise: LayerNormFunction = layer_norm

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        return self.normalise(input, self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """Return the norm of the residual stream."""
    if config.norm == "layernorm":
        return LayerNorm(config.hidden_size, config.norm_epsilon)
    return RMSNorm(config.hidden_size, config.norm_epsilon)
