"""The feed-forward part of a layer.

Shapes: B batch, S sequence, H hidden size, F inner size (F/tp on each rank under tensor parallelism).
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.kernels.reference import GatedFunction, JoinedGatedFunction, silu_gated
from ascendspeed_core.models.dropout import DropoutMasks
from ascendspeed_core.models.linear import apply_linear
from ascendspeed_core.models.projections import Projections


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` (Shazeer, 2020, GLU Variants Improve Transformer).

    Args:
        config: the model.
        inner: F, where it is not the model's `ffn_hidden_size`.
        bias: the projections have one, where it is not the model's `mlp_bias`.
    """

    auxiliary_losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig, inner: int | None = None, bias: bool | None = None) -> None:
        super().__init__()
        inner = inner or config.ffn_hidden_size
        bias = config.mlp_bias if bias is None else bias
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.projections = Projections(self, ("gate_proj", "up_proj"))
        self.gated: GatedFunction = silu_gated
        self.gated_joined: JoinedGatedFunction | None = None

    def forward(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]; `dropout_masks` drop from what adapters read."""
        if self.gated_joined and (joined := self.projections.in_one_piece(x)) is not None:
            return apply_linear(self.down_proj, self.gated_joined(joined), dropout_masks)
        gate, up = self.projections(x, dropout_masks)
        return apply_linear(self.down_proj, self.gated(gate, up), dropout_masks)


class ClampedSwiGLU(nn.Module):
    """`down(g sigmoid(1.702 g) (u + 1))`, g at most c and u from -c to c (OpenAI, 2025, gpt-oss model card, 2.2).

    Args:
        config: the model.
        inner: F.
        clamp: c.
        bias: the projections have one.
    """

    auxiliary_losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig, inner: int, clamp: float, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.projections = Projections(self, ("gate_proj", "up_proj"))
        self.clamp = clamp

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """[..., F] each -> [..., F]."""
        gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        return gate * torch.sigmoid(gate * 1.702) * (up + 1)

    def forward(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None) -> torch.Tensor:
        """[N, H] -> [N, H]; `dropout_masks` drop from what adapters read."""
        gate, up = self.projections(x, dropout_masks)
        return apply_linear(self.down_proj, self.gated(gate, up), dropout_masks)


class GeGLU(nn.Module):
    """`down(gelu(gate(x)) * up(x))` with gelu's tanh approximation (Shazeer, 2020), as in Gemma."""

    auxiliary_losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner, bias = config.ffn_hidden_size, config.mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=bias)
        self.projections = Projections(self, ("gate_proj", "up_proj"))

    def forward(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]; `dropout_masks` drop from what adapters read."""
        gate, up = self.projections(x, dropout_masks)
        return apply_linear(self.down_proj, F.gelu(gate, approximate="tanh") * up, dropout_masks)


class GeluMLP(nn.Module):
    """`down(gelu(up(x)))` with gelu's tanh approximation (Hendrycks and Gimpel, 2016), as in GPT-2 and Bloom."""

    auxiliary_losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor, dropout_masks: DropoutMasks | None = None) -> torch.Tensor:
        """[B, S, H] -> [B, S, H]; `dropout_masks` drop from what adapters read."""
        inner = self.activation(apply_linear(self.up_proj, x, dropout_masks))
        return apply_linear(self.down_proj, inner, dropout_masks)

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return F.gelu(x, approximate="tanh")


class SquaredReluMLP(GeluMLP):
    """`down(relu(up(x))^2)` (So et al., 2021, Primer, section 4.2), as in Nemotron."""

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        """Elementwise."""
        return F.relu(x).square()
