"""Normalisation layers.

Shapes: B batch, S sequence, H hidden size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.model import ModelConfig

RMSNormFunction = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
"""An implementation of `rms_norm`."""

LayerNormFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]
"""An implementation of `layer_norm`."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Divide the last dimension by its root mean square, and scale: `x / rms(x) * weight`.

    (Zhang and Sennrich, 2019, section 3.) The mean square is taken in fp32 when `x` is narrower, and the result is
    cast back before it meets the weight, as in Hugging Face's `LlamaRMSNorm`.

    Args:
        x: [..., H].
        weight: [H].
        epsilon: added to the mean square.
    """
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(x.dtype)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Normalise the last dimension to mean 0 and variance 1, then scale and shift (Ba et al., 2016): torch's own.

    Args:
        x: [..., H].
        weight: [H].
        bias: [H].
        epsilon: added to the variance.
    """
    return F.layer_norm(x, weight.shape, weight, bias, epsilon)


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
