"""Normalisation layers.

Shapes: B batch, S sequence, H hidden size.
"""

import torch
from torch import nn

from ascendspeed_core.config.model import ModelConfig


class RMSNorm(nn.Module):
    """Root mean square normalisation, `x / rms(x) * weight` (Zhang and Sennrich, 2019, section 3).

    The mean square is taken in fp32 when `x` is narrower, and the result is cast back before it meets the
    weight, as in Hugging Face's `LlamaRMSNorm`.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension: [..., H] -> [..., H]."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * normed.to(x.dtype)


def make_norm(config: ModelConfig) -> RMSNorm | nn.LayerNorm:
    """Return the norm of the residual stream: RMSNorm, or LayerNorm with a bias (Ba et al., 2016)."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)
    return RMSNorm(config.hidden_size, config.norm_epsilon)
