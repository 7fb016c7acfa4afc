"""Weight matrices of 8-bit integers with a scale for each output row, for inference.

Row n of a matrix is `scale[n] * integers[n]` with `scale = largest of |row| / 127` and integers rounded to the nearest
integer (symmetric, per channel: Krishnamoorthi, 2018, Quantizing deep convolutional networks, section 3.2). The scale
is rounded to the format of the model first, so that the integers make up for it.

Activations keep their format: this saves memory, and the reading of it, which is what decoding a token costs. The
layers stay the layers that they are; only their weight is of another kind, which knows its own product.

Shapes: O output and I input size of a layer (their shares under tensor parallelism).
"""

from collections.abc import Sequence

import torch
from torch import nn

from ascendspeed_core.kernels.int8 import Workspace, int8_linear
from ascendspeed_core.models.inference_weight import InferenceWeight
from ascendspeed_data.errors import AscendSpeedError

LARGEST = 127
"""Integers are -127 to 127: the range is symmetric."""

BLOCK_ELEMENTS = 1 << 20
"""Weights that are quantized at once: their fp32 copy stays in a CPU's cache and needs no memory to speak of."""


class Int8Weight(InferenceWeight):
    """A weight of integers and scales, in the place of a layer's weight; no gradient flows through it.

    Args:
        integers: int8, [O, I].
        scale: of each row, in the format of the activations, [O].
        workspace: of its products, which weights share.
    """

    kind = "int8"
    integers: torch.Tensor
    scale: torch.Tensor
    workspace: Workspace

    @staticmethod
    def __new__(cls, integers: torch.Tensor, scale: torch.Tensor, workspace: Workspace) -> "Int8Weight":
        """Return a tensor without storage of its own."""
        weight: Int8Weight = torch.Tensor._make_wrapper_subclass(
            cls, integers.shape, dtype=scale.dtype, device=integers.device
        )
        weight.integers, weight.scale, weight.workspace = integers, scale, workspace
        return weight

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of integers and scales."""
        return self.integers.nbytes + self.scale.nbytes

    def row_lengths(self) -> torch.Tensor:
        """Return the length of each row, fp32, [O]."""
        blocks = self.integers.split(_rows_of_a_block(self.integers))
        squares = [block.float().square().sum(-1) for block in blocks]
        return torch.cat(squares).sqrt() * self.scale.float()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `InferenceWeight`."""
        out = int8_linear(x, self.integers, self.scale, self.workspace)
        return out if bias is None else out + bias

    def again(self) -> "Int8Weight":
        """See `InferenceWeight`."""
        return Int8Weight(self.integers, self.scale, self.workspace)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Int8Weight({self.integers!r}, {self.scale!r})"


def largest_of_rows(weight: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of each row, fp32: [O, I] -> [O]."""
    lowest, highest = weight.detach().aminmax(dim=-1)
    return torch.maximum(-lowest, highest).float()


@torch.no_grad()
def quantize(
    weight: torch.Tensor, largest: torch.Tensor, workspace: Workspace, name: str = "weight"
) -> Int8Weight:
    """Return the integers and scales of a weight.

    Args:
        weight: [O, I].
        largest: absolute value of each row; of the whole row, where this rank holds a part. fp32, [O].
        workspace: of its products, which weights share.
        name: of the weight, for the message.

    Raises:
        AscendSpeedError: the weight holds a number that is not finite.
    """
    if not bool(largest.isfinite().all()):
        raise AscendSpeedError(
            f"{name} holds numbers that are not finite, which int8 cannot; leave weight_quantization out to see what "
            "the model does with them"
        )
    scale = (largest / LARGEST).to(weight.dtype)
    # A row of zeros.
    scale.masked_fill_(scale == 0, 1)
    integers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    rows = _rows_of_a_block(weight)
    for part, into, of_part in zip(weight.split(rows), integers.split(rows), scale.split(rows), strict=True):
        wide = (part.float() / of_part.float().unsqueeze(-1)).round_()
        # A scale that was rounded down to 16 bits makes the largest at most 127.25.
        into.copy_(wide.clamp_(-LARGEST, LARGEST))
    return Int8Weight(integers, scale, workspace)


def join(weights: Sequence[Int8Weight]) -> Int8Weight:
    """Lay weights below one another, and make each a view of its rows: [O_i, I] -> [O, I]."""
    integers, scale = torch.cat([w.integers for w in weights]), torch.cat([w.scale for w in weights])
    together = Int8Weight(integers, scale, weights[0].workspace)
    start = 0
    for weight in weights:
        end = start + weight.shape[0]
        weight.integers, weight.scale = together.integers[start:end], together.scale[start:end]
        start = end
    return together


def has_int8_weights(model: nn.Module) -> bool:
    """Whether some of a model's weights are int8."""
    return any(isinstance(parameter, Int8Weight) for parameter in model.parameters())


def weights_nbytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights on this device."""
    return sum(parameter.nbytes for parameter in model.parameters())


def _rows_of_a_block(matrix: torch.Tensor) -> int:
    return max(BLOCK_ELEMENTS // max(matrix.shape[-1], 1), 1)
