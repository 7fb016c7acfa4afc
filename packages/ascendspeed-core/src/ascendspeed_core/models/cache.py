"""Keys and values of the tokens seen so far, for decoding one token at a time.

Shapes: B batch, T capacity in tokens, K key-value heads of this device, D head size.
"""

import torch


class KeyValueCache:
    """Preallocated keys and values of every layer.

    Args:
        num_layers: layers that this device holds.
        batch_size: B.
        capacity_tokens: T, prompt and new tokens together.
        num_key_value_heads: K of this device.
        head_dim: D.
    """

    def __init__(
        self,
        num_layers: int,
        batch_size: int,
        capacity_tokens: int,
        num_key_value_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, batch_size, num_key_value_heads, capacity_tokens, head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length_tokens = 0
        self.padding_tokens: torch.Tensor | None = None
        """Of each text, [B], how many tokens at its beginning are nothing, so that texts of any length end together."""

    def append(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [B, K, S, D] behind what is there, and return all of the layer's keys and values."""
        end = self.length_tokens + keys.shape[2]
        self.keys[layer, :, :, self.length_tokens : end] = keys
        self.values[layer, :, :, self.length_tokens : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has stored."""
        self.length_tokens += tokens

    def place(self, row: int, other: "KeyValueCache", end: int) -> None:
        """Copy the one text of another cache into row `row`, so that it ends at `end`; what is before is zero.

        Zeros, not what memory held: a weight of 0 times infinity is no number.
        """
        start = end - other.length_tokens
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            mine[:, row, :, :start] = 0
            mine[:, row, :, start:end] = theirs[:, 0, :, : other.length_tokens]

    def select(self, rows: torch.Tensor) -> None:
        """Let row i go on from what row `rows[i]` holds; [B]."""
        for whole in (self.keys, self.values):
            used = whole[:, :, :, : self.length_tokens]
            used.copy_(used.index_select(1, rows))
