"""torch_npu's fused operators on the CPU: its own schemas, and arithmetic written from its documentation.

With them the calls of `ascendspeed_core.kernels.npu` run anywhere. They show that a call fits and what it asks for;
they say nothing of an NPU's rounding, limits or speed, and they are our reading of the documentation.
"""

from functools import cache

import torch

from support.torch_npu_wheel import operators

Tensor = torch.Tensor


def npu_apply_adam_w(
    beta1_power: float, beta2_power: float, lr: float, weight_decay: float, beta1: float, beta2: float,
    epsilon: float, grad: Tensor, max_grad_norm: Tensor | None, amsgrad: bool, maximize: bool, *, var: Tensor,
    m: Tensor, v: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The powers are those before the step (CANN's ApplyAdamW)."""
    assert max_grad_norm is None
    assert not amsgrad
    assert not maximize
    assert var.dtype == torch.float32
    m.copy_(m * beta1 + grad * (1 - beta1))
    v.copy_(v * beta2 + grad * grad * (1 - beta2))
    denominator = (v / (1 - beta2_power * beta2)).sqrt() + epsilon
    var.copy_(var * (1 - lr * weight_decay) - lr * (m / (1 - beta1_power * beta1)) / denominator)
    return var, m, v


KERNELS = {"npu_apply_adam_w.out": npu_apply_adam_w}


@cache
def install() -> torch.library.Library:
    """Define the operators in torch; autograd goes through their arithmetic."""
    library = torch.library.Library("npu", "DEF")
    for name, kernel in KERNELS.items():
        library.define(operators()[name])
        library.impl(name, kernel, "CompositeImplicitAutograd")
    return library
