"""Training under DeepSpeed: ZeRO stages 1, 2 and 3 (Rajbhandari et al., 2020).

DeepSpeed holds fp32 master weights and the optimizer's memory in long flat tensors, of which each data-parallel rank
has an equal range. Where a parameter lies in them is looked up once; a checkpoint then holds them by the
parameter's name, in the run's own format, so that any layout, with or without DeepSpeed, can go on from it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import nn

from ascendspeed_core.build import parameter_slices
from ascendspeed_core.config.layout import Layout, Stage
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.sharding import Slice, is_matrix
from ascendspeed_core.models.transformer import ModelInput, ModelOutput, Transformer
from ascendspeed_core.optim.engine import ShareOfLoss, TensorShard
from ascendspeed_core.optim.update_rule import load_optimizer_state, make_update_rule, optimizer_state_keys
from ascendspeed_core.parallel.collectives import all_reduce_sum
from ascendspeed_core.parallel.deepspeed import (
    groups_for_deepspeed,
    refuse_missing_format,
    start_deepspeed,
)
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.timeline import Reduction
from ascendspeed_data.errors import ConfigError


@dataclass(frozen=True)
class _Fragment:
    """The elements of one parameter that this rank updates.

    Attributes:
        name: of the parameter.
        part: this rank's tensor-parallel part of it.
        start: first element of that part, counted row by row.
        weight: the elements in the model's format, flat.
        flat: the long tensor of master weights that they lie in.
        offset: where in it.
    """

    name: str
    part: Slice
    start: int
    weight: torch.Tensor
    flat: torch.Tensor
    offset: int

    @property
    def boxes(self) -> tuple[Slice, ...]:
        """The elements as parts of the whole tensor."""
        return self.part.flat_range(self.start, self.start + self.weight.numel())

    def within(self, long: torch.Tensor) -> torch.Tensor:
        """Return the elements of a tensor that is laid out like `flat`."""
        return long.detach()[self.offset : self.offset + self.weight.numel()]


class ZeroEngine:
    """One model under DeepSpeed on this rank; see `optim.engine.Engine`.

    Args:
        model: this rank's part; for ZeRO-3 spread, see `parallel.deepspeed.partition_weights`.
        config: of the optimizer.
        mesh: this rank's coordinates.
        settings: config of `deepspeed.initialize`.
    """

    def __init__(
        self, model: Transformer, config: OptimizerConfig, mesh: ParallelMesh, settings: Mapping[str, Any]
    ) -> None:
        deepspeed = start_deepspeed(mesh.device)
        refuse_missing_format(next(model.parameters()).dtype, mesh.device)
        self._mesh = mesh
        self._slices = parameter_slices(model, mesh)
        refuse_other_replicas(self._slices, mesh.layout)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in trained.items():
            _tell_cut(parameter, self._slices[name], mesh)
        matrices = [p for name, p in trained.items() if is_matrix(name, self._slices[name].shape)]
        vectors = [p for name, p in trained.items() if not is_matrix(name, self._slices[name].shape)]
        self.rule = make_update_rule(config, matrices, vectors, mesh.device)
        self._state_keys = optimizer_state_keys(config)
        self._engine, self._zero, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.rule,
            config=dict(settings),
            mpu=groups_for_deepspeed(mesh),
            dist_init_required=False,
        )
        self._fragments = [
            fragment
            for name, parameter in trained.items()
            if (fragment := self._fragment(name, parameter)) is not None
        ]
        self.num_steps = 0
        self._begin_state(0)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self.rule.param_groups[0]["lr"])

    @property
    def memory(self) -> None:
        """Unknown: DeepSpeed does not say what its buffers take."""
        return

    def forward_backward(
        self, inputs: Sequence[ModelInput], share: ShareOfLoss, scale: float, auxiliary_scale: float
    ) -> None:
        """Leave the order of micro-batches to the trainer."""
        return

    def forward(self, given: ModelInput) -> ModelOutput:
        """Run the model."""
        output: ModelOutput = self._engine(given)
        return output

    def backward(self, loss: torch.Tensor, scale: float, is_last: bool) -> None:
        """Add the gradient of a micro-batch; DeepSpeed reduces it, at once or after the last one."""
        self._zero.loss_scale = scale
        self._engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed takes the mean over the ranks with the same weights; the losses are shares of a sum.
        self._engine.backward(loss * self._mesh.layout.replicas)

    def begin_last_backward(self, *stages: Stage) -> None:
        """Do nothing: DeepSpeed reduces gradients in its own time."""

    def end_last_backward(self, *stages: Stage) -> None:
        """Do nothing."""

    def wait_for_reductions(self) -> tuple[list[Reduction], float]:
        """Never called: it is for timelines, which run without DeepSpeed."""
        raise AssertionError("reductions of DeepSpeed")

    def wait_for_parameters(self) -> None:
        """Do nothing: they are there when a step returns."""

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        self._engine.zero_grad()

    def step(self, loss_scale: float | None = None) -> float | None:
        """Clip and update; return the gradient's norm, `None` when fp16 overflowed, infinite when it is no number."""
        self._engine.step()
        if self._zero.overflow:
            return None if loss_scale is not None else inf
        self.num_steps += 1
        norm = float(self._engine.get_global_grad_norm())
        # That is how DeepSpeed says that it is infinite or no number.
        return inf if norm < 0 else norm

    def checkpoint_shards(self) -> list[TensorShard]:
        """Return this rank's elements of weights, master weights and optimizer state."""
        found: list[TensorShard] = []
        for fragment in self._fragments:
            if fragment.part.tp_replica:
                # The same tensor is on all tensor-parallel ranks; the first writes it.
                continue
            values = {f"model/{fragment.name}": fragment.weight}
            values |= {f"optimizer/{kind}/{fragment.name}": v for kind, v in self._state_of(fragment).items()}
            for name, flat in values.items():
                start = 0
                for box in fragment.boxes:
                    end = start + _numel(box)
                    found.append(TensorShard(name, box, flat[start:end].view(box.sizes)))
                    start = end
        return found

    def state_slices(self) -> dict[str, tuple[Slice, ...]]:
        """Return which parts `load_state` wants."""
        return {f"{kind}/{f.name}": f.boxes for f in self._fragments for kind in self._state_of(f)}

    def load_state(self, parts: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Take over a state, written under whatever layout; absent master weights are the model's."""
        self.num_steps = num_steps
        self._begin_state(num_steps)
        for fragment in self._fragments:
            for kind, target in self._state_of(fragment).items():
                value = parts.get(f"{kind}/{fragment.name}")
                if value is not None:
                    target.copy_(value.flatten())

    def _begin_state(self, num_steps: int) -> None:
        """Let the rule remember zeros: a checkpoint may be written before the first update, if fp16 skips it."""
        for flat in {id(f.flat): f.flat for f in self._fragments}.values():
            load_optimizer_state(
                self.rule, flat, dict.fromkeys(self._state_keys, flat.new_zeros(())), num_steps
            )

    def _state_of(self, fragment: _Fragment) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps of some elements; master weights only if they are wider than the model's."""
        memory = self.rule.state[fragment.flat]
        state = {kind: fragment.within(memory[kind]) for kind in self._state_keys}
        if fragment.flat.dtype != fragment.weight.dtype:
            state["master"] = fragment.within(fragment.flat)
        return state

    def _fragment(self, name: str, parameter: nn.Parameter) -> _Fragment | None:
        """Look up which elements of a parameter are this rank's; `None` when it has none of them."""
        part = self._slices[name]
        if self._mesh.layout.zero_stage == 3:
            group, offset, length = self._zero.grad_position[self._zero.get_param_id(parameter)]
            flat = self._zero.fp32_partitioned_groups_flat[group]
            start = length * self._mesh.replica
            mine = max(min(length, _numel(part) - start), 0)
            weight = parameter.ds_tensor.detach()[:mine]  # type: ignore[attr-defined]
            return _Fragment(name, part, start, weight, flat, offset) if mine else None
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        fragment, start = mapping.lp_fragment_address, mapping.lp_fragment_address.start
        weight = parameter.detach().flatten()[start : start + fragment.numel]
        # Stage 1 in bf16 is a class of its own in DeepSpeed.
        of_bf16 = getattr(self._zero, "fp32_groups_flat_partition", None)
        flats = of_bf16 if of_bf16 is not None else self._zero.single_partition_of_fp32_groups
        flat = flats[mapping.param_group_index]
        return _Fragment(name, part, start, weight, flat, mapping.hp_fragment_address.start)


def refuse_other_replicas(slices: Mapping[str, Slice], layout: Layout) -> None:
    """Raise `ConfigError` for a parameter whose gradient is not summed over all ranks of dp x cp, as DeepSpeed does."""
    summed = layout.spanned("replicas")
    for name, part in slices.items():
        axes = layout.spanned(*part.replica_axes)
        if axes != summed:
            raise ConfigError(
                f"{name} sums its gradient over {' x '.join(part.replica_axes) if axes else 'no other rank'}, but "
                f"DeepSpeed sums all of them over {' x '.join(summed)}; leave --zero-stage and --deepspeed out"
            )


def _tell_cut(parameter: nn.Parameter, part: Slice, mesh: ParallelMesh) -> None:
    """Tell DeepSpeed whether other ranks hold other parts: it counts whole parameters once in the norm."""
    parameter.tensor_model_parallel = part.sizes != part.shape  # type: ignore[attr-defined]
    if part.has_partial_gradient:
        group = mesh.tp_subgroup(part.tp_replicas)

        def add_up(gradient: torch.Tensor) -> torch.Tensor:
            total = gradient.clone(memory_format=torch.contiguous_format)
            all_reduce_sum(total, group)
            return total

        parameter.register_hook(add_up)


def _numel(part: Slice) -> int:
    total = 1
    for length in part.sizes:
        total *= length
    return total
