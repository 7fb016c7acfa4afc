"""The engine: megatron-core's schedules, gradient buffers and optimizer under this project's trainer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

import torch

from ascendspeed_core.config.layout import Stage
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.sharding import Slice
from ascendspeed_core.megatron import megatron
from ascendspeed_core.models.transformer import ModelInput, ModelOutput
from ascendspeed_core.optim.engine import ShareOfLoss, TensorShard
from ascendspeed_core.optim.megatron import core
from ascendspeed_core.optim.megatron.model import MegatronTransformer, inner_model
from ascendspeed_core.optim.megatron.parameters import HeldParameter, elements
from ascendspeed_core.optim.megatron.settings import ddp_fields, optimizer_fields
from ascendspeed_core.optim.update_rule import load_optimizer_state, optimizer_state_keys
from ascendspeed_core.parallel.auxiliary_losses import LossSums
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.timeline import Reduction


@dataclass(frozen=True)
class _Updated:
    """What this rank updates of a parameter.

    Attributes:
        held: the parameter.
        weights: the elements that are updated, flat, as wide as the optimizer holds them.
        start: the first of them in the parameter.
        rule: torch's optimizer of them.
    """

    held: HeldParameter
    weights: torch.Tensor
    start: int
    rule: torch.optim.Optimizer

    @property
    def boxes(self) -> list[tuple[str, Slice, int]]:
        """Name, part and first element in `weights` of all that is no padding."""
        found = self.held.within(self.start, self.start + self.weights.numel())
        return [(name, box, at - self.start) for name, box, at in found]


class MegatronEngine:
    """One model under megatron-core on this rank; see `optim.engine.Engine`.

    Args:
        model: the stages of this rank.
        config: of the optimizer.
        mesh: this rank's coordinates.
        more: further fields of its configs, by the name of their class.
    """

    def __init__(
        self,
        model: MegatronTransformer,
        config: OptimizerConfig,
        mesh: ParallelMesh,
        more: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self._model, self._mesh, self._clip_grad = model, mesh, config.clip_grad
        chunks = list(model.chunks)
        settings: Any = inner_model(chunks[0]).config
        dtype: torch.dtype = settings.params_dtype
        ddp = core.make_config(
            "DistributedDataParallelConfig",
            ddp_fields(dtype, mesh.layout),
            more.get("DistributedDataParallelConfig", {}),
        )
        wrap = megatron("distributed").DistributedDataParallel
        wrapped = [
            wrap(config=settings, ddp_config=ddp, module=chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(chunks)
        ]
        model.chunks = torch.nn.ModuleList(wrapped)
        self._chunks = wrapped
        settings.finalize_model_grads_func = lambda chunks, *_, **__: core.finalize_gradients(chunks)
        settings.no_sync_func = (
            [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
        )
        self.rule = core.make_optimizer(
            core.make_config(
                "OptimizerConfig",
                optimizer_fields(config, dtype, mesh.layout),
                more.get("OptimizerConfig", {}),
            ),
            wrapped,
        )
        for group in self.rule.param_groups:
            group["weight_decay"] = config.weight_decay * group["wd_mult"]
        self._state_keys = optimizer_state_keys(config)
        states = [(held, core.state_of(self.rule, held.parameter)) for held in model.held]
        self._updated = [_Updated(held, *state) for held, state in states if state is not None]
        self._has_masters = dtype in (torch.float16, torch.bfloat16)
        self.num_steps = 0
        self._begin_state(0)

    @property
    def learning_rate(self) -> float:
        """Rate of the next step."""
        return float(self.rule.param_groups[0]["lr"])

    @property
    def memory(self) -> None:
        """Unknown: megatron-core's buffers are its own matter."""
        return

    def forward(self, given: ModelInput) -> ModelOutput:
        """Never called: `forward_backward` runs whole steps."""
        raise AssertionError("a single forward pass under megatron-core")

    def backward(self, loss: torch.Tensor, scale: float, is_last: bool) -> None:
        """Never called, see `forward`."""
        raise AssertionError("a single backward pass under megatron-core")

    def forward_backward(
        self, inputs: Sequence[ModelInput], share: ShareOfLoss, scale: float, auxiliary_scale: float
    ) -> LossSums:
        """Run the micro-batches of a step by megatron-core's schedule; see `optim.engine.Engine`."""
        self.zero_grad()
        sums = LossSums.zeros(self._model, self._mesh.device.torch)
        for _, router in self._model.token_routers():
            router.loss_factor, router.note_losses = auxiliary_scale, sums.add
        losses = core.forward_backward()(
            forward_step_func=partial(self._forward_step, share, scale),
            data_iterator=[iter(enumerate(inputs)) for _ in self._chunks],
            model=self._chunks,
            num_microbatches=len(inputs),
            # Of whole sequences, of which the ranks of context parallelism have parts.
            seq_length=inputs[0].tokens.shape[1] * self._mesh.layout.cp,
            micro_batch_size=inputs[0].tokens.shape[0],
            forward_only=False,
        )
        for loss in losses:
            sums.loss.add_(loss)
        for part in (sums.loss, *sums.auxiliary.values()):
            self._mesh.sum_over("pp", part)
        return sums

    def _forward_step(
        self, share: ShareOfLoss, scale: float, inputs: Iterator[tuple[int, ModelInput]], chunk: Any
    ) -> tuple[torch.Tensor, Any]:
        """Run one stage on the next micro-batch, and return what makes its loss of its logits."""
        number, given = next(inputs)
        out = self._model.run_chunk(chunk, self._chunks.index(chunk), given)

        def loss_of(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            loss = share(number, logits)
            # Its count of tokens is not asked for: the loss is a share of the whole already.
            return loss * scale, torch.zeros((), dtype=torch.int, device=loss.device), loss.detach()

        return out, loss_of

    def begin_last_backward(self, *stages: Stage) -> None:
        """Never called: megatron-core's schedules say so to its gradient buffers."""
        raise AssertionError("a single backward pass under megatron-core")

    def end_last_backward(self, *stages: Stage) -> None:
        """Never called, see `begin_last_backward`."""
        raise AssertionError("a single backward pass under megatron-core")

    def wait_for_reductions(self) -> tuple[list[Reduction], float]:
        """Never called: it is for timelines, which run this project's schedules."""
        raise AssertionError("reductions under megatron-core")

    def wait_for_parameters(self) -> None:
        """Gather what other ranks have updated; the forward of a module waits for its own."""
        core.wait_for_parameters(self._chunks)

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
        self.rule.zero_grad()

    def step(self, loss_scale: float | None = None) -> float | None:
        """Clip and update; return the gradient's norm, `None` when fp16 overflowed."""
        if loss_scale is not None:
            core.set_loss_scale(self.rule, loss_scale)
        if self.rule.prepare_grads():
            self.zero_grad()
            return None
        norm = float(self.rule.get_grad_norm())
        if not isfinite(norm):
            # The weights stay as they were, so that the step can be looked into.
            self.zero_grad()
            return norm
        if self._clip_grad > 0:
            core.clip_gradients(self.rule, norm, self._clip_grad)
        self.rule.step_with_ready_grads()
        self.num_steps += 1
        return norm

    def checkpoint_shards(self) -> list[TensorShard]:
        """Return this rank's share of what a checkpoint holds: a part that several ranks have is written by one."""
        found: list[TensorShard] = []
        updated = {id(one.held): one for one in self._updated}
        for number, held in enumerate(self._model.held):
            if not held.is_written:
                continue
            axis, one = "edp" if held.is_expert else "replicas", updated.get(id(held))
            flat = held.parameter.detach().view(-1)
            is_sharded = self._mesh.layout.sharded_optimizer and held.parameter.requires_grad
            if not is_sharded and number % self._mesh.layout.size(axis) != self._mesh.index(axis):
                continue
            if one is None:
                # Other ranks update all of it, or nothing does.
                first, last = (0, 0) if is_sharded else (0, len(flat))
                parts = list(held.within(first, last))
                found += [_shard(f"model/{name}", box, flat, at) for name, box, at in parts]
                continue
            own = flat[one.start : one.start + one.weights.numel()]
            for name, box, at in one.boxes:
                found.append(_shard(f"model/{name}", box, own, at))
                for kind, values in self._state_of(one).items():
                    found.append(_shard(f"optimizer/{kind}/{name}", box, values, at))
        return found

    def state_slices(self) -> dict[str, tuple[Slice, ...]]:
        """Return which parts of the optimizer state `load_state` wants, by name."""
        found: dict[str, tuple[Slice, ...]] = {}
        for one in self._updated:
            for name, box, _ in one.boxes:
                for kind in self._kinds():
                    found[f"{kind}/{name}"] = (*found.get(f"{kind}/{name}", ()), box)
        return found

    def load_state(self, parts: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Take over a state, written under whatever engine and layout; absent master weights are the model's."""
        self.num_steps = num_steps
        self._begin_state(num_steps)
        flat = {name: values.flatten() for name, values in parts.items()}
        read = dict.fromkeys(flat, 0)
        for one in self._updated:
            for name, box, at in one.boxes:
                for kind, target in self._state_of(one).items():
                    values = flat.get(f"{kind}/{name}")
                    if values is not None:
                        first, count = read[f"{kind}/{name}"], elements(box)
                        target[at : at + count].copy_(values[first : first + count])
                        read[f"{kind}/{name}"] = first + count

    def _begin_state(self, num_steps: int) -> None:
        """Let each weight have a state of its own, zeros: checkpoints may be written before the first update."""
        for one in self._updated:
            zeros = dict.fromkeys(self._state_keys, one.weights.new_zeros(()))
            load_optimizer_state(one.rule, one.weights, zeros, num_steps)
            core.set_num_steps(one.rule, num_steps)

    def _kinds(self) -> tuple[str, ...]:
        return (*self._state_keys, "master") if self._has_masters else self._state_keys

    def _state_of(self, one: _Updated) -> dict[str, torch.Tensor]:
        """Return what a checkpoint keeps of some elements, flat."""
        memory = self._rule_state(one)
        return {
            kind: (one.weights if kind == "master" else memory[kind]).detach().view(-1)
            for kind in self._kinds()
        }

    def _rule_state(self, one: _Updated) -> Mapping[str, torch.Tensor]:
        found: Mapping[str, torch.Tensor] = one.rule.state[one.weights]
        return found


def _shard(name: str, box: Slice, flat: torch.Tensor, start: int) -> TensorShard:
    """Return some consecutive values as a part of a tensor."""
    return TensorShard(name, box, flat[start : start + elements(box)].view(box.sizes))
