"""Dropout (Srivastava et al., 2014) whose masks depend on what is dropped, not on the rank that drops it.

Whether a number stays is a hash of the seed, the number of its sample in the run, its token, layer and site in the
layer (counter-based random numbers: Salmon et al., 2011). So ranks that hold the same activations drop the same, those
that hold parts drop what one process would drop there, recomputed layers drop the same again, and a run that resumes
under another layout draws what it would have drawn. Nothing is drawn from torch's generators.

Shapes: B batch, S sequence (its part on this rank where it is cut), H hidden size, N query heads of this rank, T keys.
"""

from dataclasses import dataclass, replace
from typing import Final

import torch

AFTER_EMBEDDING: Final = -1
"""Number of the layer to which the embedding's dropout belongs."""

OF_WEIGHTS, AFTER_ATTENTION, AFTER_MLP = range(3)
"""Sites in a layer where something is dropped."""

BEFORE_ADAPTER: Final = {
    name: 3 + number
    for number, name in enumerate(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
}
"""Further sites: the input of each linear layer's adapter."""


@dataclass(frozen=True)
class Dropout:
    """How much is dropped in a run.

    Attributes:
        hidden: share of what embedding, attention and MLP add to the residual stream.
        attention: share of attention's weights.
        seed: of the run.
        sequence_part: which part of the sequence the residual stream has on this rank, where it is cut.
        inner_part: which part attention and MLP have: the whole sequence, except under context parallelism.
    """

    hidden: float
    attention: float
    seed: int
    sequence_part: int = 0
    inner_part: int = 0

    def masks(self, samples: torch.Tensor, heads: range) -> "DropoutMasks":
        """Return the masks of a micro-batch.

        Args:
            samples: number of each sample in the run, [B].
            heads: query heads of this rank.
        """
        low, high = samples.to(torch.int32), (samples >> 32).to(torch.int32)
        keys = mix(mix(low ^ _mixed(self.seed)) ^ high)
        return DropoutMasks(self, keys, heads)


@dataclass(frozen=True)
class DropoutMasks:
    """What is dropped of a micro-batch; a function of its attributes.

    Attributes:
        dropout: how much.
        samples: hash of each sample, int32, [B].
        heads: query heads of this rank.
        layer: number of the layer.
    """

    dropout: Dropout
    samples: torch.Tensor
    heads: range
    layer: int = AFTER_EMBEDDING

    def in_layer(self, number: int) -> "DropoutMasks":
        """Return the masks of a layer."""
        return replace(self, layer=number)

    def hidden(self, x: torch.Tensor, site: int = 0) -> torch.Tensor:
        """Drop from hidden states, [B, S, H] -> [B, S, H].

        Args:
            x: what is added to the residual stream.
            site: where in the layer.
        """
        if not self.dropout.hidden:
            return x
        tokens = self._tokens(site, self.dropout.sequence_part * x.shape[1], x.shape[1])
        return _drop(x, tokens.unsqueeze(-1), self.dropout.hidden)

    def adapter_input(self, x: torch.Tensor, site: int, share: float, first_column: int) -> torch.Tensor:
        """Drop from what an adapter reads, [B, S, I] -> [B, S, I].

        Args:
            x: input of a linear layer, or this rank's columns of it.
            site: of the linear layer, see `BEFORE_ADAPTER`.
            share: how much is dropped.
            first_column: of `x` in the whole input.
        """
        tokens = self._tokens(site, self.dropout.inner_part * x.shape[1], x.shape[1])
        return _drop(x, tokens.unsqueeze(-1), share, first_column)

    def weights(self, weights: torch.Tensor) -> torch.Tensor:
        """Drop from attention's weights, [B, N, S, T] -> [B, N, S, T]; sequences are whole here."""
        queries = self._tokens(OF_WEIGHTS, 0, weights.shape[2])
        heads = torch.arange(self.heads.start, self.heads.stop, dtype=torch.int32, device=weights.device)
        of_heads = mix(queries.unsqueeze(1) ^ mix(heads + 1).unsqueeze(-1))
        return _drop(weights, of_heads.unsqueeze(-1), self.dropout.attention)

    def _tokens(self, site: int, first: int, count: int) -> torch.Tensor:
        """Return a hash of each token at a site of this layer, [B, S]."""
        tokens = torch.arange(first, first + count, dtype=torch.int32, device=self.samples.device)
        here = mix(self.samples ^ _mixed((self.layer + 1) * 16 + site + 1))
        return mix(here.unsqueeze(-1) ^ tokens)


def _drop(x: torch.Tensor, rows: torch.Tensor, share: float, first_column: int = 0) -> torch.Tensor:
    """Set a share of `x` to zero, and enlarge the rest so that the sum stays the same on average.

    Args:
        x: [..., columns].
        rows: hash of each row, [..., 1].
        share: how much is dropped.
        first_column: of `x` in the whole rows.
    """
    columns = torch.arange(first_column, first_column + x.shape[-1], dtype=torch.int32, device=x.device)
    bits = mix(rows ^ columns).bitwise_and_(0x7FFFFFFF)
    return x.masked_fill(bits < int(share * 2**31), 0) * (1 / (1 - share))


def mix(x: torch.Tensor) -> torch.Tensor:
    """Return a hash of each 32-bit number: every bit of it depends evenly on every bit of the number.

    Multiplications that wrap and shifts (`lowbias32` of Wellons, 2018, Prospecting for Hash Functions). int32 is the
    widest type that every device multiplies fast.
    """
    x = ((x >> 16) & 0xFFFF) ^ x
    x = x.mul_(0x7FEB352D)
    x = ((x >> 15) & 0x1FFFF).bitwise_xor_(x)
    x = x.mul_(0x846CA68B - 2**32)
    return ((x >> 16) & 0xFFFF).bitwise_xor_(x)


def _mixed(number: int) -> int:
    """Return the hash of one number, as int32."""
    low, high = number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF
    parts = torch.tensor([low, high]).to(torch.int32)
    return int(mix(mix(parts[:1]) ^ parts[1:]))
