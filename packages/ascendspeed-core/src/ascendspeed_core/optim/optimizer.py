"""AdamW or SGD over this process's slices, with fp32 master weights and gradients when the model computes in 16 bits.

The update is elementwise, so it runs on plain local tensors whatever the layout; only the gradients' sums and their
norm need the other processes. State is named by parameter and cut like it: a checkpoint of it is as independent of
the layout as the weights.

Processes that hold the same weights, dp x cp of them, add their gradients up. With a sharded optimizer (ZeRO-1:
Rajbhandari et al., 2020, section 5.1) each of them updates some rows of every tensor: one reduce-scatter gives it the
sum of their gradients, one all-gather gives all of them the new weights. That moves the bytes of the replicated
optimizer's one all-reduce, and divides its state by dp x cp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import nn

from ascendspeed_core.build import parameter_slices
from ascendspeed_core.config.parallel import Stage
from ascendspeed_core.config.sharding import Slice, assign_writers, rounded_share
from ascendspeed_core.config.training import OptimizerConfig
from ascendspeed_core.models.transformer import ModelInput, ModelOutput, Transformer
from ascendspeed_core.optim.engine import TensorShard
from ascendspeed_core.optim.update_rule import load_optimizer_state, make_update_rule, optimizer_state_keys
from ascendspeed_core.parallel.collectives import (
    Finish,
    all_gather_rows,
    all_reduce_sum,
    start_all_reduce_sum,
    start_reduce_scatter_sum,
)
from ascendspeed_core.parallel.mesh import ParallelMesh


@dataclass
class _Slot:
    """One parameter as the optimizer sees it.

    Attributes:
        name: parameter name.
        parameter: what the model computes with: this process's part of the tensor.
        rows: rows of it that this process updates; all of them unless the optimizer is sharded.
        slice: those rows in the whole tensor.
        master: those rows in fp32 or float64; shares storage with the parameter if that is as wide.
        gradient: of the whole part, sum over micro-batches so far; kept only for 16-bit parameters.
        is_borrowed: another stage owns the parameter; it counts there in the norm.
    """

    name: str
    parameter: nn.Parameter
    rows: slice
    slice: Slice
    master: torch.Tensor
    gradient: torch.Tensor | None = None
    is_borrowed: bool = False

    @property
    def counts_in_norm(self) -> bool:
        """Whether this process is the one of those with the same part whose gradient is counted."""
        return self.slice.copy == 0 and not self.is_borrowed

    @property
    def has_copy(self) -> bool:
        """Whether the master weights are a wider copy."""
        return self.master.dtype != self.parameter.dtype


class MasterOptimizer:
    """The optimizer of one model on this process.

    Attributes:
        rule: what turns a gradient into an update; its parameters are the master weights.
        num_steps: updates so far.
    """

    def __init__(self, model: Transformer, config: OptimizerConfig, mesh: ParallelMesh) -> None:
        self._mesh, self._model = mesh, model
        self._started: list[tuple[list[_Slot], Finish]] = []
        self._is_tied = model.config.tie_word_embeddings
        self._clip_grad = config.clip_grad
        self._is_sharded = mesh.layout.sharded_optimizer and mesh.layout.replicas > 1
        slices = parameter_slices(model, mesh)
        self._slots = [
            self._slot(name, p, slices[name]) for name, p in model.named_parameters() if p.requires_grad
        ]
        for slot in self._slots:
            slot.is_borrowed = slot.name in model.borrowed
            if slot.has_copy:
                _accumulate_wide(slot)
        matrices = [slot.master for slot in self._slots if slot.parameter.dim() > 1]
        vectors = [slot.master for slot in self._slots if slot.parameter.dim() <= 1]
        self.rule = make_update_rule(config, matrices, vectors, mesh.device)
        self._state_keys = optimizer_state_keys(config)
        self.num_steps = 0

    def _slot(self, name: str, parameter: nn.Parameter, part: Slice) -> _Slot:
        rows = slice(0, parameter.shape[0])
        if self._is_sharded:
            rows = rounded_share(parameter.shape[0], self._mesh.layout.replicas, self._mesh.replica)
        mine = parameter.detach()[rows]
        narrow = mine.dtype in (torch.float16, torch.bfloat16)
        return _Slot(name, parameter, rows, part.rows(rows), mine.float() if narrow else mine)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self.rule.param_groups[0]["lr"])

    def step(self, loss_scale: float | None = None) -> float | None:
        """Reduce the gradients over the other processes, clip them by their global norm, and update.

        Args:
            loss_scale: by which the loss was multiplied; with one, a step that overflowed is skipped everywhere.

        Returns:
            Norm of the whole model's gradient before clipping; `None` for a skipped step. When it is not finite,
            nothing is updated.
        """
        gradients = self.finish_reductions()
        self._sum_tied(gradients)
        self._sum_copies(gradients)
        if loss_scale is not None:
            if self._overflowed(gradients):
                self.forget_gradients()
                return None
            torch._foreach_div_(gradients, loss_scale)
        norm = self._norm(gradients)
        if not isfinite(norm):
            # The weights stay as they were, so that the step can be looked into.
            self.forget_gradients()
            return norm
        if self._clip_grad > 0:
            scale = self._clip_grad / (norm + 1e-6)
            if scale < 1.0:
                torch._foreach_mul_(gradients, scale)
        for slot, gradient in zip(self._slots, gradients, strict=True):
            slot.master.grad = gradient
        self.rule.step()
        self.num_steps += 1
        self.forget_gradients()
        self._publish()
        return norm

    @property
    def state_bytes(self) -> int:
        """Bytes that stay between steps, the weights that the model computes with left out."""
        return sum(slot.master.nbytes * (len(self._state_keys) + slot.has_copy) for slot in self._slots)

    @property
    def update_bytes(self) -> int:
        """Most bytes that adding up and applying the gradients takes, the gradients included."""
        gradients = sum(slot.parameter.numel() * slot.master.itemsize for slot in self._slots)
        if self._mesh.group("replicas") is None:
            return gradients
        # The message that they are copied into.
        return 2 * gradients

    def forward(self, given: ModelInput) -> ModelOutput:
        """Run a model without a pipeline."""
        output: ModelOutput = self._model(given)
        return output

    def backward(self, loss: torch.Tensor, scale: float, is_last: bool) -> None:
        """Add the gradient of a micro-batch to the parameters; `step` reduces it."""
        (loss * scale).backward()

    def forget_gradients(self) -> None:
        """Drop the gradients of all parameters."""
        self.rule.zero_grad(set_to_none=True)
        for slot in self._slots:
            slot.parameter.grad = slot.gradient = None

    @torch.no_grad()
    def _publish(self) -> None:
        """Give the model the new weights, rounded to its format."""
        for slot in self._slots:
            if slot.has_copy:
                slot.parameter[slot.rows].copy_(slot.master)
        group = self._mesh.group("replicas")
        if group is None or not self._is_sharded:
            return
        shares = [self._rows_of(rank, self._slots) for rank in range(self._mesh.layout.replicas)]
        parameters = [slot.parameter.detach() for slot in self._slots]
        mine = _join(parameters, shares[self._mesh.replica], _longest(parameters, shares))
        for rank, row in enumerate(all_gather_rows(mine, group)):
            if rank != self._mesh.replica:
                _split(row, parameters, shares[rank])

    def start_reduction(self, stage: Stage) -> None:
        """Start to add up the gradients of one stage, which are complete; `step` waits for them.

        A weight that another stage of this process uses too waits for `step`.
        """
        names = {id(p) for module in self._model.modules_of(stage) for p in module.parameters()}
        others = {
            id(p)
            for other in self._model.stages
            if other is not stage
            for module in self._model.modules_of(other)
            for p in module.parameters()
        }
        mine = [slot for slot in self._slots if id(slot.parameter) in names - others]
        if self._mesh.group("replicas") is not None:
            self._started.append((mine, self._start_sum(mine)))

    def finish_reductions(self) -> list[torch.Tensor]:
        """Return by slot the sum of the gradients over all replicas, of the rows that this process updates.

        Each rank's loss is already divided by the tokens of all ranks.
        """
        if self._mesh.group("replicas") is None:
            return [_take_gradient(slot) for slot in self._slots]
        started, self._started = self._started, []
        early = {slot.name for slots, _ in started for slot in slots}
        rest = [slot for slot in self._slots if slot.name not in early]
        if rest:
            started.append((rest, self._start_sum(rest)))
        sums: dict[str, torch.Tensor] = {}
        for slots, finish in started:
            parts = _views(finish(), [slot.master for slot in slots])
            sums |= zip((slot.name for slot in slots), parts, strict=True)
        return [sums[slot.name] for slot in self._slots]

    def _start_sum(self, slots: list[_Slot]) -> Finish:
        """Start one reduction of the gradients of some parameters."""
        group = self._mesh.group("replicas")
        assert group is not None
        if not self._is_sharded:
            return start_all_reduce_sum(_message(slots, [[slice(None)] * len(slots)])[0], group)
        shares = [self._rows_of(rank, slots) for rank in range(self._mesh.layout.replicas)]
        return start_reduce_scatter_sum(_message(slots, shares), group)

    def _rows_of(self, replica: int, slots: list[_Slot]) -> list[slice]:
        """Return the rows of each parameter that one of the processes with the same weights updates."""
        return [rounded_share(slot.parameter.shape[0], self._mesh.layout.replicas, replica) for slot in slots]

    def _sum_tied(self, gradients: list[torch.Tensor]) -> None:
        """Add up what first and last stage found for the weight that embedding and head share."""
        if self._mesh.embedding_group is None or not self._is_tied:
            return
        for slot, gradient in zip(self._slots, gradients, strict=True):
            if slot.name == "embedding.weight":
                all_reduce_sum(gradient, self._mesh.embedding_group)

    def _sum_copies(self, gradients: list[torch.Tensor]) -> None:
        """Add up the gradients of a part that several tensor-parallel devices hold, each doing a share of its work."""
        by_copies: dict[int, list[torch.Tensor]] = {}
        for slot, gradient in zip(self._slots, gradients, strict=True):
            if slot.slice.has_partial_gradient:
                by_copies.setdefault(slot.slice.copies, []).append(gradient)
        for copies, shared in sorted(by_copies.items()):
            flat = torch.cat([gradient.flatten() for gradient in shared])
            all_reduce_sum(flat, self._mesh.neighbours(copies))
            _split(flat, shared, [slice(None)] * len(shared))

    def _over_model(self, value: torch.Tensor) -> torch.Tensor:
        """Add a number up over all processes that hold different parts of the gradient."""
        for dimension in ("tp", "pp", "replicas") if self._is_sharded else ("tp", "pp"):
            self._mesh.sum_over(dimension, value)
        return value

    def _overflowed(self, gradients: list[torch.Tensor]) -> bool:
        """Tell, on all processes alike, whether any gradient of the whole model is infinite or no number."""
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all()
        return bool(self._over_model((~finite).to(torch.float32).reshape(1)))

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        """Norm over all processes: parts and stages are added up, what several hold is counted once."""
        counted = [g for g, slot in zip(gradients, self._slots, strict=True) if slot.counts_in_norm]
        square = torch.nn.utils.get_total_norm(counted).square() if counted else gradients[0].new_zeros(())
        return float(self._over_model(square).sqrt())

    def state(self) -> dict[str, tuple[Slice, torch.Tensor]]:
        """Return this process's part of the state, under names that no layout changes."""
        tensors = {}
        for slot in self._slots:
            known = {"master": slot.master, **self.rule.state.get(slot.master, {})}
            for kind in self._kinds(slot):
                value = known[kind] if kind in known else torch.zeros_like(slot.master)
                tensors[f"{kind}/{slot.name}"] = (slot.slice, value)
        return tensors

    def pieces(self) -> list[TensorShard]:
        """Return this process's share of what a checkpoint holds: a part that several have is written by one."""
        copies, slices = self._mesh.layout.replicas, parameter_slices(self._model, self._mesh)
        borrowed = tuple(f"/{name}" for name in self._model.borrowed)
        # Name, part, value, how many devices hold that part, and which of them this one is.
        held: list[tuple[str, Slice, torch.Tensor, int, int]] = []
        for name, parameter in self._model.named_parameters():
            if not parameter.requires_grad:
                continue
            part = slices[name]
            holder = part.copy * copies + self._mesh.replica
            held.append((f"model/{name}", part, parameter, part.copies * copies, holder))
        for name, (part, value) in self.state().items():
            replicas, replica = (1, 0) if self._is_sharded else (copies, self._mesh.replica)
            held.append(
                (f"optimizer/{name}", part, value, part.copies * replicas, part.copy * replicas + replica)
            )
        held = [entry for entry in held if not entry[0].endswith(borrowed)]
        writers = assign_writers((name, part, holders) for name, part, _, holders, _ in held)
        return [
            (name, part, value)
            for name, part, value, _, holder in held
            if writers[name] == holder and value.numel()
        ]

    def state_slices(self) -> dict[str, tuple[Slice, ...]]:
        """Return which parts `load_state` wants."""
        return {f"{kind}/{slot.name}": (slot.slice,) for slot in self._slots for kind in self._kinds(slot)}

    def _kinds(self, slot: _Slot) -> tuple[str, ...]:
        """Return what a checkpoint keeps of a parameter."""
        return (*self._state_keys, "master") if slot.has_copy else self._state_keys

    def load_state(self, parts: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Take over a state.

        Args:
            parts: this process's parts, under the names of `state`; `master` tensors may be absent, then the model's
                weights are taken.
            num_steps: steps that led to it.
        """
        self.num_steps = num_steps
        for slot in self._slots:
            master = parts.get(f"master/{slot.name}")
            if slot.has_copy and master is not None:
                slot.master.copy_(master)
            memory = {kind: parts[f"{kind}/{slot.name}"] for kind in self._state_keys}
            load_optimizer_state(self.rule, slot.master, memory, num_steps)


def _accumulate_wide(slot: _Slot) -> None:
    """Add each micro-batch's 16-bit gradient into a wide one, so that small contributions are not rounded away."""

    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if slot.gradient is None:
            slot.gradient = parameter.grad.float()
        else:
            slot.gradient.add_(parameter.grad)
        parameter.grad = None

    slot.parameter.register_post_accumulate_grad_hook(add)


def _take_gradient(slot: _Slot) -> torch.Tensor:
    """Take a gradient away from its parameter, so that it is freed when it is done with."""
    if slot.has_copy:
        gradient, slot.gradient = slot.gradient, None
    else:
        gradient, slot.parameter.grad = slot.parameter.grad, None
    if gradient is None:
        return torch.zeros_like(slot.parameter, dtype=slot.master.dtype)
    return gradient


def _message(slots: list[_Slot], shares: list[list[slice]]) -> torch.Tensor:
    """Put the gradients of some parameters behind one another, a row for each share, with zeros behind shorter ones.

    Each gradient is freed as soon as the message has it.
    """
    length = _longest([slot.parameter for slot in slots], shares)
    message = slots[0].master.new_zeros(len(shares), length)
    ends = [0] * len(shares)
    for number, slot in enumerate(slots):
        gradient = _take_gradient(slot)
        for share, rows in enumerate(shares):
            part = gradient[rows[number]]
            start, ends[share] = ends[share], ends[share] + part.numel()
            message[share, start : ends[share]].view_as(part).copy_(part)
    return message


def _longest(tensors: list[torch.Tensor], shares: list[list[slice]]) -> int:
    """Return the most elements that any share holds."""
    return max(
        sum(tensor[part].numel() for tensor, part in zip(tensors, rows, strict=True)) for rows in shares
    )


def _join(tensors: list[torch.Tensor], rows: list[slice], length: int) -> torch.Tensor:
    """Put rows of each tensor behind one another, and zeros up to a length."""
    flat = torch.cat([tensor[part].flatten() for tensor, part in zip(tensors, rows, strict=True)])
    return torch.nn.functional.pad(flat, (0, length - flat.numel()))


def _views(flat: torch.Tensor, like: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the parts of `flat`, in the shapes of other tensors."""
    used = flat[: sum(tensor.numel() for tensor in like)]
    parts = used.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _split(flat: torch.Tensor, tensors: list[torch.Tensor], rows: list[slice]) -> None:
    """Write what `_join` put together into rows of each tensor."""
    start = 0
    for tensor, part in zip(tensors, rows, strict=True):
        target = tensor[part]
        target.copy_(flat[start : start + target.numel()].view_as(target))
        start += target.numel()
