"""AdamW or SGD over this rank's parts, with fp32 master weights and gradients when the model computes in 16 bits.

The update is elementwise, so it runs on plain local tensors whatever the layout; only the gradients' sums and their
norm need the other ranks. State is named by parameter and cut like it: a checkpoint of it is as independent of the
layout as the weights.

Over which ranks a parameter's gradient is summed says its `Slice`: `replica_axes`, those with other tokens, and
`has_partial_gradient`, neighbouring tensor-parallel ranks with other shares of its work.
"""

from collections.abc import Callable, Mapping
from functools import reduce
from math import isfinite

import torch
from torch import nn

from ascendspeed_core.build import parameter_slices
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.sharding import Slice, assign_writers, is_matrix
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.optim.buckets import BucketedReduction
from ascendspeed_core.optim.engine import TensorShard
from ascendspeed_core.optim.gradient_sum import ParameterSlot, Replicas, split
from ascendspeed_core.optim.update_rule import load_optimizer_state, make_update_rule, optimizer_state_keys
from ascendspeed_core.parallel.collectives import all_reduce_sum
from ascendspeed_core.parallel.mesh import ParallelMesh


class MasterOptimizer:
    """The optimizer of one model on this rank.

    Attributes:
        rule: what turns a gradient into an update; its parameters are the master weights.
        num_steps: updates so far.
        reduction: starts and finishes the sums over replicas.
    """

    def __init__(
        self,
        model: Transformer,
        config: OptimizerConfig,
        mesh: ParallelMesh,
        slices: Mapping[str, Slice] | None = None,
    ) -> None:
        """Make the optimizer.

        Args:
            model: this rank's part, ready.
            config: update rule and clipping.
            mesh: this rank's coordinates.
            slices: the part of each parameter that this rank holds; by default what the sharding table says.
        """
        self._mesh, self._model = mesh, model
        self._is_tied = model.config.tie_word_embeddings
        self._clip_grad = config.clip_grad
        self._slices = parameter_slices(model, mesh) if slices is None else slices
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        axes = {name: mesh.layout.spanned(*self._slices[name].replica_axes) for name in trained}
        # In the same order on all ranks, since each sums its gradients in turn.
        self._replicas = {each: Replicas.create(mesh, each) for each in sorted(set(axes.values()))}
        self._slots = [self._slot(name, p, self._replicas[axes[name]]) for name, p in trained.items()]
        for slot in self._slots:
            slot.is_borrowed = slot.name in model.borrowed
            if slot.has_copy:
                slot.accumulate_wide()
        layout = mesh.layout
        self.reduction = BucketedReduction(
            model,
            self._slots,
            layout.bucket_elements,
            layout.overlap_grad_reduce or layout.early_reduction,
            layout.overlap_param_gather,
        )
        is_decayed = {slot.name: is_matrix(slot.name, slot.parameter.shape) for slot in self._slots}
        matrices = [slot.master for slot in self._slots if is_decayed[slot.name]]
        vectors = [slot.master for slot in self._slots if not is_decayed[slot.name]]
        self.rule = make_update_rule(config, matrices, vectors, mesh.device)
        self._state_keys = optimizer_state_keys(config)
        self.num_steps = 0

    def _slot(self, name: str, parameter: nn.Parameter, replicas: Replicas) -> ParameterSlot:
        rows = replicas.rows(parameter)
        mine = parameter.detach()[rows]
        narrow = mine.dtype in (torch.float16, torch.bfloat16)
        master = mine.float() if narrow else mine
        return ParameterSlot(name, parameter, rows, self._slices[name].rows(rows), master, replicas)

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
        # Weights that no module asked for since the last update.
        self.reduction.wait_for_parameters()
        gradients = self.finish_reductions()
        self._sum_tied(gradients)
        self._sum_copies(gradients)
        if loss_scale is not None:
            if self._overflowed(gradients):
                self.zero_grad()
                return None
            torch._foreach_div_(gradients, loss_scale)
        norm = self._norm(gradients)
        if not isfinite(norm):
            # The weights stay as they were, so that the step can be looked into.
            self.zero_grad()
            return norm
        if self._clip_grad > 0:
            scale = self._clip_grad / (norm + 1e-6)
            if scale < 1.0:
                torch._foreach_mul_(gradients, scale)
        for slot, gradient in zip(self._slots, gradients, strict=True):
            slot.master.grad = gradient
        self.rule.step()
        self.num_steps += 1
        self.zero_grad()
        self._publish()
        return norm

    @property
    def state_bytes(self) -> int:
        """Bytes that stay between steps, the weights that the model computes with left out."""
        return sum(slot.master.nbytes * (len(self._state_keys) + slot.has_copy) for slot in self._slots)

    @property
    def update_bytes(self) -> int:
        """Most bytes that adding up and applying the gradients takes, the gradients included."""
        total = sum(slot.parameter.numel() * slot.master.itemsize for slot in self._slots)
        messages = [
            bucket.elements * bucket.slots[0].master.itemsize
            for bucket in self.reduction.buckets
            if bucket.replicas.group is not None
        ]
        # A message is made beside the gradients that are copied into it; with shares, all messages beside the sums.
        return total + (sum(messages) if self._mesh.layout.sharded_optimizer else max(messages, default=0))

    @property
    def gathered_bytes(self) -> int:
        """Bytes of new parameters that travel while the next forward computes."""
        layout = self._mesh.layout
        if not (layout.sharded_optimizer and layout.overlap_param_gather):
            return 0
        return sum(slot.parameter.nbytes for slot in self._slots if slot.replicas.group is not None)

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        self.reduction.drop()
        self.rule.zero_grad(set_to_none=True)
        for slot in self._slots:
            slot.parameter.grad = slot.gradient = None

    @torch.no_grad()
    def _publish(self) -> None:
        """Give the model the new weights, rounded to its format."""
        for slot in self._slots:
            if slot.has_copy:
                slot.parameter[slot.rows].copy_(slot.master)
        self.reduction.publish()

    def finish_reductions(self) -> list[torch.Tensor]:
        """Return by slot the sum of the gradients over all replicas, of the rows that this rank updates.

        Each rank's loss is already divided by the tokens of all ranks.
        """
        sums = self.reduction.finish()
        return [sums[slot.name] for slot in self._slots]

    def _by_replicas(self, slots: list[ParameterSlot]) -> list[tuple[Replicas, list[ParameterSlot]]]:
        """Return parameters by the ranks over which their gradients are summed; almost always there is one group."""
        found = [
            (replicas, [slot for slot in slots if slot.replicas is replicas])
            for replicas in self._replicas.values()
        ]
        return [(replicas, group) for replicas, group in found if group]

    def _sum_tied(self, gradients: list[torch.Tensor]) -> None:
        """Sum the gradients of first and last stage for the weight that embedding and head share."""
        if self._mesh.embedding_group is None or not self._is_tied:
            return
        for slot, gradient in zip(self._slots, gradients, strict=True):
            if slot.name == "embedding.weight":
                all_reduce_sum(gradient, self._mesh.embedding_group)

    def _sum_copies(self, gradients: list[torch.Tensor]) -> None:
        """Sum the gradients of a part that several tensor-parallel ranks hold, each doing a share of its work."""
        by_count: dict[int, list[torch.Tensor]] = {}
        for slot, gradient in zip(self._slots, gradients, strict=True):
            if slot.slice.has_partial_gradient:
                by_count.setdefault(slot.slice.tp_replicas, []).append(gradient)
        for count, shared in sorted(by_count.items()):
            flat = torch.cat([gradient.flatten() for gradient in shared])
            all_reduce_sum(flat, self._mesh.tp_subgroup(count))
            split(flat, shared, [slice(None)] * len(shared))

    def _sum_over_model(
        self,
        gradients: list[torch.Tensor],
        measure: Callable[[list[ParameterSlot], list[torch.Tensor]], torch.Tensor],
    ) -> torch.Tensor:
        """Sum a measure of the gradient over the whole model, each element counted once; the same on all ranks.

        Args:
            gradients: by slot.
            measure: of some of this rank's slots and gradients; what several ranks hold it must count on one of them.
        """
        is_sharded = self._mesh.layout.sharded_optimizer
        of_slot = dict(zip((slot.name for slot in self._slots), gradients, strict=True))
        measured = []
        for replicas, slots in self._by_replicas(self._slots):
            value = measure(slots, [of_slot[slot.name] for slot in slots])
            for axis in () if is_sharded else replicas.other_axes:
                self._mesh.sum_over(axis, value)
            measured.append(value)
        total = reduce(torch.add, measured)
        for axes in ("tp", "pp", "replicas") if is_sharded else ("pp",):
            self._mesh.sum_over(axes, total)
        return total

    def _overflowed(self, gradients: list[torch.Tensor]) -> bool:
        """Tell, on all ranks alike, whether any gradient of the whole model is infinite or no number."""

        def overflowed(_: list[ParameterSlot], mine: list[torch.Tensor]) -> torch.Tensor:
            finite = torch.stack([gradient.isfinite().all() for gradient in mine]).all()
            return (~finite).to(torch.float32).reshape(1)

        return bool(self._sum_over_model(gradients, overflowed))

    def _norm(self, gradients: list[torch.Tensor]) -> float:
        """Norm over all ranks: parts and stages are summed, what several ranks hold is counted once."""

        def square(slots: list[ParameterSlot], mine: list[torch.Tensor]) -> torch.Tensor:
            counted = [g for g, slot in zip(mine, slots, strict=True) if slot.counts_in_norm]
            return torch.nn.utils.get_total_norm(counted).square() if counted else mine[0].new_zeros(())

        return float(self._sum_over_model(gradients, square).sqrt())

    def state(self) -> dict[str, tuple[Slice, torch.Tensor]]:
        """Return this rank's part of the state, under names that no layout changes."""
        return {
            f"{kind}/{slot.name}": (slot.slice, value)
            for slot in self._slots
            for kind, value in self._state_of(slot).items()
        }

    def _state_of(self, slot: ParameterSlot) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps of a parameter; zeros before the first update."""
        known = {"master": slot.master, **self.rule.state.get(slot.master, {})}
        return {
            kind: known[kind] if kind in known else torch.zeros_like(slot.master)
            for kind in self._kinds(slot)
        }

    def checkpoint_shards(self) -> list[TensorShard]:
        """Return this rank's share of what a checkpoint holds: a part that several ranks have is written by one."""
        self.reduction.wait_for_parameters()
        borrowed = tuple(f"/{name}" for name in self._model.borrowed)
        # Name, part, value, how many ranks hold that part, and which of them this one is.
        held: list[tuple[str, Slice, torch.Tensor, int, int]] = []
        for slot in self._slots:
            part, size, index = self._slices[slot.name], slot.replicas.size, slot.replicas.index
            holders, holder = part.tp_replicas * size, part.tp_replica * size + index
            held.append((f"model/{slot.name}", part, slot.parameter, holders, holder))
        for slot in self._slots:
            size, index = (1, 0) if slot.replicas.is_sharded else (slot.replicas.size, slot.replicas.index)
            holders, holder = slot.slice.tp_replicas * size, slot.slice.tp_replica * size + index
            for kind, value in self._state_of(slot).items():
                held.append((f"optimizer/{kind}/{slot.name}", slot.slice, value, holders, holder))
        for name, bias in self._model.updated_without_gradient():
            # All ranks of a stage have it.
            size, index = self._mesh.layout.replicas, self._mesh.replica
            part = self._slices[name]
            holders, holder = part.tp_replicas * size, part.tp_replica * size + index
            held.append((f"model/{name}", part, bias, holders, holder))
        held = [entry for entry in held if not entry[0].endswith(borrowed)]
        writers = assign_writers((name, part, holders) for name, part, _, holders, _ in held)
        return [
            TensorShard(name, part, value)
            for name, part, value, _, holder in held
            if writers[name] == holder and value.numel()
        ]

    def state_slices(self) -> dict[str, tuple[Slice, ...]]:
        """Return which parts `load_state` wants."""
        return {f"{kind}/{slot.name}": (slot.slice,) for slot in self._slots for kind in self._kinds(slot)}

    def _kinds(self, slot: ParameterSlot) -> tuple[str, ...]:
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
