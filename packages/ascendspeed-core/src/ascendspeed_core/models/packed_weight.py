"""Weights in the order in which a CPU's matrix product reads them, for inference: panels, or that of oneDNN.

They take the place of the plain ones, so a model needs no more memory.

Shapes: O output and I input size of a layer (their shares under tensor parallelism).
"""

import logging

import torch
from torch import nn

from ascendspeed_core.kernels.huge_pages import HugePages
from ascendspeed_core.kernels.onednn import OneDnnMatrix, has_packed_product, packed
from ascendspeed_core.kernels.panels import Panels, why_not
from ascendspeed_core.models.inference_weight import InferenceWeight
from ascendspeed_core.models.latent_attention import MOVED_LAYERS
from ascendspeed_core.models.linear import HALVES
from ascendspeed_core.models.lm_head import NormalisedHead
from ascendspeed_core.models.projections import Projections
from ascendspeed_core.models.transformer import Transformer

logger = logging.getLogger(__name__)

PackedMatrix = Panels | OneDnnMatrix


class PackedWeight(InferenceWeight):
    """A weight in the order in which it is multiplied, or one as torch lays it out whose product oneDNN computes.

    Args:
        whole: what multiplies.
        rows: those that are this weight, of several that were packed as one; by default all.
    """

    kind = "packed"
    whole: PackedMatrix
    rows: slice

    @staticmethod
    def __new__(cls, whole: PackedMatrix, rows: slice | None = None) -> "PackedWeight":
        """Return a tensor without storage of its own."""
        rows = rows or slice(0, whole.shape[0])
        shape = (rows.stop - rows.start, whole.shape[1])
        weight: PackedWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=whole.dtype)
        weight.whole, weight.rows = whole, rows
        return weight

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of its own: none where it shares the memory of a plain weight."""
        return self.numel() * self.whole.dtype.itemsize if self.whole.nbytes else 0

    def plain(self) -> torch.Tensor:
        """Return a copy of the values as torch lays them out, [O, I]."""
        whole = self.whole.plain()
        return whole if self._is_whole() else whole[self.rows].clone()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `InferenceWeight`."""
        if self._is_whole():
            return self.whole.product(x, bias)
        out = self.whole.product(x, None)[..., self.rows]
        return out if bias is None else out + bias

    def again(self) -> "PackedWeight":
        """See `InferenceWeight`."""
        return PackedWeight(self.whole, self.rows)

    def _is_whole(self) -> bool:
        return self.numel() == self.whole.shape.numel()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({self.plain()!r})"


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
    memory = HugePages()
    for module in model.modules():
        projections = getattr(module, "projections", None)
        if isinstance(projections, Projections) and _is_plain(projections.weight):
            _pack_joined(projections, memory)
    for name, module in model.named_modules():
        is_left_out = isinstance(module, NormalisedHead) or name.endswith((*HALVES, *MOVED_LAYERS))
        if isinstance(module, nn.Linear) and _is_plain(module.weight) and not is_left_out:
            is_shared = model.embedding is not None and module.weight is model.embedding.weight
            whole = OneDnnMatrix(module.weight.detach()) if is_shared else pack(module.weight, memory)
            module.weight = _parameter(PackedWeight(whole))


def pack(weight: torch.Tensor, memory: HugePages) -> PackedMatrix:
    """Pack a weight as this machine multiplies it fastest; it must have a packed product.

    Args:
        weight: [O, I].
        memory: where panels go.
    """
    reason = why_not(weight.dtype, weight.shape[1])
    if reason is None:
        return Panels(weight, memory)
    logger.info("oneDNN multiplies with a weight of %s: %s", list(weight.shape), reason)
    return OneDnnMatrix(packed(weight))


def _pack_joined(projections: Projections, memory: HugePages) -> None:
    """Pack layers that read the same input as one."""
    assert projections.weight is not None
    layers, start = projections.layers, 0
    whole = pack(projections.weight, memory)
    projections.weight = PackedWeight(whole)
    for layer in layers:
        end = start + layer.weight.shape[0]
        layer.weight = _parameter(PackedWeight(whole, slice(start, end)))
        start = end


def _parameter(weight: PackedWeight) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _is_plain(weight: torch.Tensor | None) -> bool:
    """Whether a weight lies as torch lays it out, and is there: of few ids a rank's part of a head may be empty."""
    return weight is not None and type(weight) in (torch.Tensor, nn.Parameter) and weight.numel() > 0
