"""AdamW over this process's slices, with fp32 master weights and gradients when the model computes in 16 bits.

The update is elementwise, so it runs on plain local tensors whatever the layout; only the gradient norm needs
the other processes. State is keyed by parameter name and cut like the parameter: a checkpoint of it is as
independent of the layout as the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ascendspeed_core.config.training import OptimizerConfig
from ascendspeed_core.device import HOST
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.collectives import all_reduce_sum
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights.load import local_tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Tensors that AdamW keeps for each parameter."""


@dataclass
class _Slot:
    """One parameter as the optimizer sees it.

    Attributes:
        name: parameter name.
        parameter: what the model computes with.
        master: this process's slice in fp32 or float64; shares storage with the parameter if that is as wide.
        gradient: sum over micro-batches so far, kept only for 16-bit parameters.
        is_borrowed: another stage owns the parameter; it counts there in the norm.
    """

    name: str
    parameter: nn.Parameter
    master: torch.Tensor
    gradient: torch.Tensor | None = None
    is_borrowed: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether other processes hold other slices."""
        return isinstance(self.parameter, DTensor) and any(p.is_shard() for p in self.parameter.placements)

    @property
    def has_copy(self) -> bool:
        """Whether the master weights are a wider copy."""
        return self.master.dtype != self.parameter.dtype


class MasterOptimizer:
    """AdamW for one model on this process."""

    def __init__(self, model: Transformer, config: OptimizerConfig, mesh: ParallelMesh) -> None:
        self._mesh = mesh
        self._is_tied = model.config.tie_word_embeddings
        self._clip_grad = config.clip_grad
        self._slots = [_make_slot(name, parameter) for name, parameter in model.named_parameters()]
        for slot in self._slots:
            slot.is_borrowed = slot.name in model.borrowed
            if slot.has_copy:
                _accumulate_wide(slot)
        matrices = [slot.master for slot in self._slots if slot.parameter.dim() > 1]
        vectors = [slot.master for slot in self._slots if slot.parameter.dim() <= 1]
        self.adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay, "wd_mult": 1.0},
                {"params": vectors, "weight_decay": 0.0, "wd_mult": 0.0},
            ],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=True if mesh.device.has_fused_adamw else None,
        )
        self.num_steps = 0

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self.adamw.param_groups[0]["lr"])

    def step(self, loss_scale: float | None = None) -> float | None:
        """Reduce the gradients over data-parallel ranks, clip them by their global norm, and update.

        Args:
            loss_scale: by which the loss was multiplied; with one, a step that overflowed is skipped everywhere.

        Returns:
            Norm of the whole model's gradient before clipping; `None` for a skipped step.
        """
        gradients = [_take_gradient(slot) for slot in self._slots]
        if self._is_tied and self._mesh.ends is not None:
            self._sum_tied(gradients)
        _sum_over_data_parallel(gradients, self._mesh)
        if loss_scale is not None:
            if self._overflowed(gradients):
                self._forget_gradients()
                return None
            torch._foreach_div_(gradients, loss_scale)
        norm = self._norm(gradients)
        if self._clip_grad > 0:
            scale = self._clip_grad / (norm + 1e-6)
            if scale < 1.0:
                torch._foreach_mul_(gradients, scale)
        for slot, gradient in zip(self._slots, gradients, strict=True):
            slot.master.grad = gradient
        self.adamw.step()
        self.num_steps += 1
        self._forget_gradients()
        self._publish()
        return norm

    def _forget_gradients(self) -> None:
        self.adamw.zero_grad(set_to_none=True)
        for slot in self._slots:
            slot.parameter.grad = None

    def _publish(self) -> None:
        """Give the model the new weights, rounded to its format."""
        with torch.no_grad():
            for slot in self._slots:
                if slot.has_copy:
                    local_tensor(slot.parameter).copy_(slot.master)

    def _overflowed(self, gradients: list[torch.Tensor]) -> bool:
        """Tell, on all processes alike, whether any gradient of the whole model is infinite or no number."""
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        found = (~finite).to(torch.float32).reshape(1)
        return bool(self._mesh.sum_over("pp", self._mesh.sum_over("tp", found)))

    def _sum_tied(self, gradients: list[torch.Tensor]) -> None:
        """Add up what first and last stage found for the weight that embedding and head share."""
        ends = self._mesh.ends
        assert ends is not None
        for slot, gradient in zip(self._slots, gradients, strict=True):
            if slot.name == "embedding.weight":
                all_reduce_sum(gradient, ends)

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        """Norm over all processes: slices and stages are added up, whole and tied tensors counted once."""
        squares = []
        own = [(g, s.is_cut) for g, s in zip(gradients, self._slots, strict=True) if not s.is_borrowed]
        for is_cut in (True, False):
            part = [gradient for gradient, cut in own if cut == is_cut]
            total = torch.nn.utils.get_total_norm(part).square() if part else gradients[0].new_zeros(())
            squares.append(self._mesh.sum_over("tp", total) if is_cut else total)
        return float(self._mesh.sum_over("pp", squares[0] + squares[1]).sqrt())

    def state(self) -> dict[str, torch.Tensor]:
        """Return the state under layout-free names, each tensor cut as its parameter."""
        tensors = {}
        for slot in self._slots:
            for moment in MOMENTS:
                value = self.adamw.state.get(slot.master, {}).get(moment)
                filled = torch.zeros_like(slot.master) if value is None else value
                tensors[f"{moment}/{slot.name}"] = _like_parameter(filled, slot.parameter)
            if slot.has_copy:
                tensors[f"master/{slot.name}"] = _like_parameter(slot.master, slot.parameter)
        return tensors

    def load_state(self, local_slices: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Take over a state.

        Args:
            local_slices: this process's slices, under the names of `state`; `master` tensors may be absent, then
                the model's weights are taken.
            num_steps: steps that led to it.
        """
        self.num_steps = num_steps
        for slot in self._slots:
            master = local_slices.get(f"master/{slot.name}")
            if slot.has_copy and master is not None:
                slot.master.copy_(master)
            # torch keeps the step count of a fused optimizer on the device, of others on the host.
            step_device = slot.master.device if self.adamw.defaults["fused"] else HOST.torch
            self.adamw.state[slot.master] = {
                "step": torch.tensor(float(num_steps), device=step_device),
                **{moment: local_slices[f"{moment}/{slot.name}"].to(slot.master) for moment in MOMENTS},
            }

    def parameter_of(self, state_name: str) -> nn.Parameter:
        """Return the parameter to which a name of `state` belongs."""
        wanted = state_name.partition("/")[2]
        return next(slot.parameter for slot in self._slots if slot.name == wanted)


def _make_slot(name: str, parameter: nn.Parameter) -> _Slot:
    local = local_tensor(parameter.detach())
    narrow = local.dtype in (torch.float16, torch.bfloat16)
    return _Slot(name, parameter, local.float() if narrow else local)


def _accumulate_wide(slot: _Slot) -> None:
    """Add each micro-batch's 16-bit gradient into a wide one, so that small contributions are not rounded away."""

    def add(parameter: torch.Tensor) -> None:
        gradient = _whole_gradient(slot.parameter)
        slot.gradient = gradient.float() if slot.gradient is None else slot.gradient.add_(gradient)
        parameter.grad = None

    slot.parameter.register_post_accumulate_grad_hook(add)


def _whole_gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Return this process's slice of the gradient, cut exactly as the parameter."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)
    return local_tensor(gradient)


def _take_gradient(slot: _Slot) -> torch.Tensor:
    if slot.has_copy:
        gradient, slot.gradient = slot.gradient, None
    else:
        gradient = _whole_gradient(slot.parameter) if slot.parameter.grad is not None else None
    return torch.zeros_like(slot.master) if gradient is None else gradient


def _sum_over_data_parallel(gradients: list[torch.Tensor], mesh: ParallelMesh) -> None:
    """Add the gradients up in one reduction; each rank's loss is already divided by the tokens of all ranks."""
    if mesh.layout.dp == 1:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    mesh.sum_over("dp", flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


def _like_parameter(local: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Wrap a slice as the DTensor of the parameter's shape and cut; plain parameters give a plain tensor."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
