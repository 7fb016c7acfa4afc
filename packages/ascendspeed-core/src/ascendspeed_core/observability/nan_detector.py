"""Find where numbers stopped being finite: the step is computed again, and every module is looked at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh, gather_objects

Kind = Literal["weight", "result", "gradient"]
KINDS: tuple[Kind, ...] = ("weight", "result", "gradient")
"""What is looked at, in the order in which one spoils the next."""

MODULE_ORDER = ("embedding", "embedding_norm", "layers", "final_norm", "output_head")
"""Modules of the model in the order in which tokens pass them."""


@dataclass(frozen=True)
class NonFiniteTensor:
    """What was not finite first on one process.

    Attributes:
        kind: a weight, the result of a module, or the gradient of such a result.
        name: of the parameter or module, under the model's global names.
        values: for example `nan and inf`.
    """

    kind: Kind
    name: str
    values: str


def find_not_finite(model: Transformer, mesh: ParallelMesh, step: Callable[[], object]) -> str:
    """Compute a step again, and say which weight, module or gradient of which rank was not finite first.

    Weights spoil results, results spoil the layers behind them, and gradients the layers before them; of what the
    ranks find, the first in that order is the cause. All ranks call this alike.

    Args:
        model: this rank's part, with the weights that the step had.
        mesh: of this rank.
        step: forward and backward of the same micro-batches.
    """
    found = _of_weights(model)
    if not any(gather_objects(found is not None, mesh)):
        with _watched(model) as seen:
            step()
        found = min(seen, key=lambda one: KINDS.index(one.kind)) if seen else None
    findings = [(rank, one) for rank, one in enumerate(gather_objects(found, mesh)) if one is not None]
    if not findings:
        return "computed again, everything is finite: suspect a device that errs"
    rank, first = min(findings, key=lambda pair: (*_order(pair[1]), pair[0]))
    where = f" (rank {rank} of {mesh.layout.world_size})" if mesh.layout.world_size > 1 else ""
    what = {
        "weight": f"{first.name} holds {first.values} before the step",
        "result": f"{first.name} is the first module whose result holds {first.values}",
        "gradient": f"all results are finite, the gradient of {first.name}'s result is the first that holds "
        f"{first.values}",
    }
    return what[first.kind] + where


def _of_weights(model: Transformer) -> NonFiniteTensor | None:
    for name, parameter in model.named_parameters():
        values = _values_not_finite(parameter)
        if values:
            return NonFiniteTensor("weight", name, values)
    return None


@contextmanager
def _watched(model: Transformer) -> Iterator[list[NonFiniteTensor]]:
    """Collect the first result and the first gradient that are not finite, in the order of computation."""
    seen: dict[Kind, NonFiniteTensor] = {}
    found: list[NonFiniteTensor] = []

    def look(kind: Kind, name: str, tensor: torch.Tensor) -> None:
        if kind not in seen:
            values = _values_not_finite(tensor)
            if values:
                seen[kind] = NonFiniteTensor(kind, name, values)
                found.append(seen[kind])

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            # Layers with auxiliary losses return these too.
            for tensor in tree_leaves(output):
                if isinstance(tensor, torch.Tensor):
                    look("result", name, tensor)
                    if tensor.requires_grad:
                        tensor.register_hook(lambda gradient: look("gradient", name, gradient))

        return after

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _values_not_finite(tensor: torch.Tensor) -> str:
    """Return which values of a tensor are not finite; empty when all are."""
    if bool(tensor.isfinite().all()):
        return ""
    kinds = ["nan"] * bool(tensor.isnan().any()) + ["inf"] * bool(tensor.isinf().any())
    return " and ".join(kinds)


def _order(finding: NonFiniteTensor) -> tuple[int, int, int]:
    """Return what comes first: by kind, then by depth in the model, for gradients from its end."""
    parts = finding.name.split(".")
    number = int(parts[1]) if parts[0] == "layers" else 0
    depth = MODULE_ORDER.index(parts[0]) if parts[0] in MODULE_ORDER else len(MODULE_ORDER)
    sign = -1 if finding.kind == "gradient" else 1
    return KINDS.index(finding.kind), sign * depth, sign * number
