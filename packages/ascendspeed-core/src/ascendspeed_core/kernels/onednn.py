"""Matrix products by oneDNN on a CPU, with weights in its own order.

torch 2.13 gives products in fp32 to MKL, which on an AMD processor takes twice the time of oneDNN, with one row or
many; and those in bf16 to oneDNN, which brings the weight into its own order in each call. With a weight that lies in
that order already one row takes a third of the time in fp32 and half in bf16 (`benchmarks/infer.py`).
"""

import torch

ROWS = 16
"""oneDNN is asked which order suits this number of rows; the same order is as fast for one row and for hundreds."""


def has_packed_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of a format can be packed on a device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def packed(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight in oneDNN's order, a tensor of torch's layout `_mkldnn`: [O, I]."""
    reordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return reordered


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `x @ weight.T + bias`: [..., I] -> [..., O]; no gradient flows.

    Args:
        x: [..., I].
        weight: of `packed`, or as torch lays it out; [O, I].
        bias: [O].
    """
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class OneDnnMatrix:
    """A weight that oneDNN multiplies, in its order or as torch lays it out.

    Args:
        whole: of `packed`, or plain; [O, I].
    """

    def __init__(self, whole: torch.Tensor) -> None:
        self.whole, self.shape, self.dtype = whole, whole.shape, whole.dtype
        self.nbytes = whole.numel() * whole.itemsize if whole.is_mkldnn else 0
        """None where it shares the memory of a plain weight."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `packed_linear`."""
        return packed_linear(x, self.whole, bias)

    def plain(self) -> torch.Tensor:
        """Return a copy of the weight as torch lays it out, [O, I]."""
        return self.whole.to_dense() if self.whole.is_mkldnn else self.whole.clone()
