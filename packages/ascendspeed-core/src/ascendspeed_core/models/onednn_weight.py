"""Weights in the order in which a CPU's matrix product reads them, for inference.

They take the place of the plain ones, so a model needs no more memory.

Shapes: O output and I input size of a layer (their shares under tensor parallelism).
"""

import torch
from torch import nn

from ascendspeed_core.kernels.onednn import has_packed_product, packed, packed_linear
from ascendspeed_core.models.inference_weight import InferenceWeight
from ascendspeed_core.models.latent_attention import MOVED_LAYERS
from ascendspeed_core.models.linear import HALVES
from ascendspeed_core.models.lm_head import NormalisedHead
from ascendspeed_core.models.projections import Projections
from ascendspeed_core.models.transformer import Transformer


class OneDnnWeight(InferenceWeight):
    """A weight in the order of oneDNN, or one as torch lays it out whose product oneDNN computes all the same.

    Args:
        whole: what `kernels.onednn.packed_linear` takes.
        rows: those that are this weight, of several that were packed as one; by default all.
    """

    kind = "packed"
    whole: torch.Tensor
    rows: slice

    @staticmethod
    def __new__(cls, whole: torch.Tensor, rows: slice | None = None) -> "OneDnnWeight":
        """Return a tensor without storage of its own."""
        rows = rows or slice(0, whole.shape[0])
        shape = (rows.stop - rows.start, whole.shape[1])
        weight: OneDnnWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=whole.dtype, device=whole.device
        )
        weight.whole, weight.rows = whole, rows
        return weight

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of its own: none where it shares the memory of a plain weight."""
        return self.numel() * self.whole.itemsize if self.whole.is_mkldnn else 0

    def plain(self) -> torch.Tensor:
        """Return a copy of the values as torch lays them out, [O, I]."""
        whole = self.whole.to_dense() if self.whole.is_mkldnn else self.whole
        return whole[self.rows].clone()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `InferenceWeight`."""
        if self.rows.stop - self.rows.start == self.whole.shape[0]:
            return packed_linear(x, self.whole, bias)
        out = packed_linear(x, self.whole, None)[..., self.rows]
        return out if bias is None else out + bias

    def again(self) -> "OneDnnWeight":
        """See `InferenceWeight`."""
        return OneDnnWeight(self.whole, self.rows)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OneDnnWeight({self.plain()!r})"


def pack_weights(model: Transformer) -> None:
    """Pack the weights of this process's layers, in place, if its device and format have such a product.

    A weight that something else reads, as the embedding does that of a tied head, keeps its memory and is only
    multiplied by the other operator.

    Args:
        model: with its final weights; it answers from now on, and is not trained.
    """
    first = next(model.parameters())
    if not has_packed_product(first.dtype, first.device):
        return
    for module in model.modules():
        projections = getattr(module, "projections", None)
        if isinstance(projections, Projections) and _is_plain(projections.weight):
            _pack_joined(projections)
    for name, module in model.named_modules():
        is_left_out = isinstance(module, NormalisedHead) or name.endswith((*HALVES, *MOVED_LAYERS))
        if isinstance(module, nn.Linear) and _is_plain(module.weight) and not is_left_out:
            is_shared = model.embedding is not None and module.weight is model.embedding.weight
            whole = module.weight.detach() if is_shared else packed(module.weight)
            module.weight = _parameter(OneDnnWeight(whole))


def _pack_joined(projections: Projections) -> None:
    """Pack layers that read the same input as one."""
    assert projections.weight is not None
    layers, start = projections.layers, 0
    whole = packed(projections.weight)
    projections.weight = OneDnnWeight(whole)
    for layer in layers:
        end = start + layer.weight.shape[0]
        layer.weight = _parameter(OneDnnWeight(whole, slice(start, end)))
        start = end


def _parameter(weight: OneDnnWeight) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _is_plain(weight: torch.Tensor | None) -> bool:
    """Whether a weight lies as torch lays it out, and is there: of few ids a rank's part of a head may be empty."""
    return weight is not None and type(weight) in (torch.Tensor, nn.Parameter) and weight.numel() > 0
