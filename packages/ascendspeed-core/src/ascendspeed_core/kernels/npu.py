"""Operators that torch_npu has fused; their names and parameters are those of its schemas.

They are called as `torch.ops.npu.*`, which exist once torch has loaded torch_npu. Nothing here has run on an NPU yet:
the tests check each call against torch_npu's schemas and run it with CPU kernels written from its documentation.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class NpuAdamW(torch.optim.Optimizer):
    """AdamW by `npu_apply_adam_w`: one tensor at a time, weight and moments in place, no temporaries.

    The state is that of `torch.optim.AdamW`.

    Args:
        params: groups of fp32 tensors.
        lr: learning rate.
        betas: memory of the gradient and of its square.
        eps: added to the root of the second moment.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        beta1, beta2 = group["betas"]
        # The kernel takes the powers before this step, and multiplies them once more.
        done = int(state["step"])
        torch.ops.npu.npu_apply_adam_w.out(
            beta1**done,
            beta2**done,
            group["lr"],
            group["weight_decay"],
            beta1,
            beta2,
            group["eps"],
            weight.grad,
            None,
            False,
            False,
            var=weight,
            m=state["exp_avg"],
            v=state["exp_avg_sq"],
        )
        state["step"] += 1
