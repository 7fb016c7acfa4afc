"""Normalisation layers.

Shapes: B batch, S sequence, H hidden size, N heads, D head size.
"""

from collections.abc import Callable

import torch
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.kernels.reference import LayerNormFunction, RMSNormFunction, layer_norm, rms_norm


class RMSNorm(nn.Module):
    """`rms_norm` with its weight.

    Args:
        size: H.
        epsilon: added to the mean square.
        unit_offset: the factor is 1 + weight, in fp32 for narrower inputs, as in Gemma.
    """

    def __init__(self, size: int, epsilon: float, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if unit_offset else torch.ones(size))
        self.epsilon, self.unit_offset = epsilon, unit_offset
        self.normalise: RMSNormFunction = rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        if not self.unit_offset:
            return self.normalise(x, self.weight, self.epsilon)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.normalise(wide, 1 + self.weight.to(wide.dtype), self.epsilon).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """`layer_norm` with its weight, and a bias if it has one.

    Args:
        size: H.
        epsilon: added to the variance.
        has_bias: whether it has one.
        unit_offset: the factor is 1 + weight, as in Nemotron.
    """

    def __init__(self, size: int, epsilon: float, has_bias: bool = True, unit_offset: bool = False) -> None:
        super().__init__(size, eps=epsilon, bias=has_bias)
        self.unit_offset = unit_offset
        self.normalise: LayerNormFunction = layer_norm

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., H] -> [..., H]."""
        weight = 1 + self.weight if self.unit_offset else self.weight
        return self.normalise(input, weight, self.bias, self.eps)


class HeadNorm(nn.Module):
    """Normalises each head with weights of its own, without bias (Command R+, StableLM 2); in fp32 or wider.

    Args:
        heads: N.
        size: D.
        epsilon: added to the variance or the mean square.
        is_centred: the mean is subtracted, as in LayerNorm.
    """

    def __init__(self, heads: int, size: int, epsilon: float, is_centred: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, size))
        self.epsilon, self.is_centred = epsilon, is_centred

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N, D] -> [..., N, D]."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.is_centred:
            wide = wide - wide.mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (normed * self.weight).to(x.dtype)


class AllHeadsNorm(RMSNorm):
    """RMSNorm over all heads together (OLMo 2): the ranks that share them average their mean squares.

    Attributes:
        average: averages a tensor over the ranks that share the heads; `None` where one rank has them all.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__(size, epsilon)
        self.average: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., N D] -> [..., N D]; each rank has its heads' part of it."""
        if self.average is None:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = self.average(wide.square().mean(-1, keepdim=True))
        return self.weight * (wide * torch.rsqrt(mean_square + self.epsilon)).to(x.dtype)


def make_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """Return the norm of the residual stream."""
    offset = config.norm_unit_offset
    if config.norm == "layernorm":
        return LayerNorm(config.hidden_size, config.norm_epsilon, config.norm_bias, offset)
    return RMSNorm(config.hidden_size, config.norm_epsilon, offset)
