"""Weights of other kinds than torch's, for inference: int8, packed.

A layer stays the layer that it is; only its weight is of another kind, which knows its own product. So `F.linear` works
wherever it is called: in plain layers, joined ones, cut ones and those with adapters.

Shapes: O output and I input size of a layer (their shares under tensor parallelism).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F

from ascendspeed_data.errors import AscendSpeedError


class InferenceWeight(torch.Tensor):
    """What stands in the place of a layer's weight, with its shape and format; no gradient flows through it.

    `F.linear` takes it; nothing else does.
    """

    kind: ClassVar[str]
    """For messages: `int8`, `packed`."""

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return `x @ weight.T + bias`: [..., I] -> [..., O]."""
        raise NotImplementedError

    def again(self) -> Self:
        """Return another tensor of the same contents."""
        raise NotImplementedError

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
        cls, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Refuse all arithmetic but the product; `nn.Parameter` detaches what it is made of."""
        if func is torch.ops.aten.detach.default:
            (weight,) = args
            return weight.again()
        raise AscendSpeedError(f"{cls.kind} weights are for answering: only F.linear takes them, not {func}")


def _linear(x: torch.Tensor, weight: InferenceWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    if x.requires_grad and torch.is_grad_enabled():
        raise AscendSpeedError(
            f"{weight.kind} weights have no gradient: they are for answering; compute under torch.no_grad()"
        )
    return weight.product(x, bias)
