"""Rotary position embedding (Su et al., 2021, RoFormer, section 3.4.2), half-split layout of GPT-NeoX and LLaMA.

Shapes: B batch, S sequence, N heads (this device's), D head size.
"""

import torch


class RotaryTable:
    """Cosines and sines of every position up to a length; not a module, so it never enters a checkpoint.

    Computed in fp32, as the published weights were trained.
    """

    def __init__(self, head_dim: int, base: float, max_positions: int) -> None:
        self.head_dim, self.base, self.max_positions = head_dim, base, max_positions
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def at(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine, each [B, S, 1, D], for `positions` [B, S]."""
        if self._table is None or self._table[0].device != positions.device:
            self._table = self._compute(positions.device)
        cos, sin = self._table
        return cos[positions].unsqueeze(-2).to(dtype), sin[positions].unsqueeze(-2).to(dtype)

    def _compute(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float()
        frequencies = 1.0 / (self.base ** (pairs / self.head_dim))
        angles = torch.outer(torch.arange(self.max_positions).float(), frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(device), angles.sin().to(device)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + D/2) of [B, S, N, D] by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
