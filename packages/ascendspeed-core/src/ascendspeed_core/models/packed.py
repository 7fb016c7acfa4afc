"""Weights in the order in which a CPU's matrix product reads them, for models that answer.

The layers stay the layers that they are; only their weight is of another kind, which knows its own product. It takes
the place of the plain one, so a model needs no more memory.

Shapes: O output and I input size of a layer (their shares under tensor parallel).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.kernels.onednn import has_packed_product, packed, packed_linear
from ascendspeed_core.models.head import NormalisedHead
from ascendspeed_core.models.lora import HALVES
from ascendspeed_core.models.projections import Projections
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_data.errors import AscendSpeedError


class PackedWeight(torch.Tensor):
    """A weight that `F.linear` takes, in the place of a layer's weight; no gradient flows through it.

    Args:
        whole: what `kernels.onednn.packed_linear` takes.
        rows: those that are this weight, of several that were packed as one; by default all.
    """

    whole: torch.Tensor
    rows: slice

    @staticmethod
    def __new__(cls, whole: torch.Tensor, rows: slice | None = None) -> "PackedWeight":
        """Return a tensor without storage of its own."""
        rows = rows or slice(0, whole.shape[0])
        shape = (rows.stop - rows.start, whole.shape[1])
        weight: PackedWeight = torch.Tensor._make_wrapper_subclass(
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

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute `F.linear`; leave what reads shapes and formats to torch."""
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Refuse all arithmetic but the product; `nn.Parameter` detaches what it is made of."""
        if func is torch.ops.aten.detach.default:
            (weight,) = args
            return cls(weight.whole, weight.rows)
        raise TypeError(f"{func} of packed weights: F.linear takes them, plain() gives their values")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({self.plain()!r})"


def _linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        raise AscendSpeedError("packed weights have no gradient: they are for answering; use torch.no_grad()")
    if weight.rows.stop - weight.rows.start == weight.whole.shape[0]:
        return packed_linear(x, weight.whole, bias)
    out = packed_linear(x, weight.whole, None)[..., weight.rows]
    return out if bias is None else out + bias


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
        is_left_out = isinstance(module, NormalisedHead) or name.endswith(HALVES)
        if isinstance(module, nn.Linear) and _is_plain(module.weight) and not is_left_out:
            is_shared = model.embedding is not None and module.weight is model.embedding.weight
            whole = module.weight.detach() if is_shared else packed(module.weight)
            module.weight = _parameter(PackedWeight(whole))


def _pack_joined(projections: Projections) -> None:
    """Pack layers that read the same input as one."""
    assert projections.weight is not None
    layers, start = projections.layers, 0
    whole = packed(projections.weight)
    projections.weight = PackedWeight(whole)
    for layer in layers:
        end = start + layer.weight.shape[0]
        layer.weight = _parameter(PackedWeight(whole, slice(start, end)))
        start = end


def _parameter(weight: PackedWeight) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


def _is_plain(weight: torch.Tensor | None) -> bool:
    """Whether a weight lies as torch lays it out, and is there: of few ids a device's part of a head may be empty."""
    return weight is not None and type(weight) in (torch.Tensor, nn.Parameter) and weight.numel() > 0
