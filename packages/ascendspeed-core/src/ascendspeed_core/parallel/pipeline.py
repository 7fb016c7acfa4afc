"""Pipeline parallelism: the layers cut into stages, micro-batches flowing through them.

Training runs torch's schedules, see `config.layout.PipelineSchedule`. The plain one is 1F1B: after a warm-up each
stage does one forward and one backward in turn, so that a stage keeps the activations of at most `pp` micro-batches.
Each micro-batch enters as its number; the first stage looks its tokens up, every stage its positions, the loss its
labels, so nothing but hidden states travels, and micro-batches may differ in size.

Shapes: B micro-batch size, S sequence length (S/cp under context parallelism), H hidden size, V vocabulary. Hidden
states are [B, S, H], with sequence parallelism [B, S/tp, H].
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from ascendspeed_core.config.layout import Stage
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.auxiliary_losses import LossSums, attach_losses
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import hidden_shape, output_shape
from ascendspeed_core.parallel.timeline import Kind, Recorder


class _GPipe(ScheduleGPipe):
    """GPipe with any number of micro-batches; torch before 2.11 refuses fewer than stages, though its steps do not
    need them."""

    def __init__(self, stage: PipelineStage, n_microbatches: int, **options: Any) -> None:
        super().__init__(stage, max(n_microbatches, stage.num_stages), **options)
        self._n_microbatches = n_microbatches


class _DualPipeV(ScheduleDualPipeV):
    """DualPipeV that hands on the result of a forward before the backward beside it begins.

    torch sends both when both are done, though it computes them one after the other: what waits for the forward would
    wait three times as long.
    """

    def _calculate_single_rank_operations(self, rank: int) -> list[Any]:
        actions = super()._calculate_single_rank_operations(rank)
        return [one for action in actions for one in (getattr(action, "sub_actions", None) or (action,))]


SCHEDULES: dict[str, Any] = {
    "1f1b": Schedule1F1B,
    "gpipe": _GPipe,
    "looped-bfs": ScheduleLoopedBFS,
    "interleaved": ScheduleInterleaved1F1B,
    "interleaved-zb": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": _DualPipeV,
}


def run_pipeline(
    model: Transformer,
    mesh: ParallelMesh,
    inputs: Sequence[ModelInput],
    loss_of: Callable[[int, torch.Tensor], torch.Tensor],
    recorder: Recorder | None = None,
    on_last_backward: Callable[[Stage], None] | None = None,
    on_stage_done: Callable[[Stage], None] | None = None,
    auxiliary_scale: float = 1.0,
) -> LossSums:
    """Run micro-batches forwards and backwards through all stages; gradients are added to the parameters.

    Args:
        model: this rank's stages.
        mesh: the mesh, with this rank's coordinates.
        inputs: of every micro-batch, for a loss; B may differ.
        loss_of: number of a micro-batch and what the last stage gives -> scalar; called by the rank that has it.
        recorder: notes when each stage computes.
        on_last_backward: called before what completes the gradients of a stage.
        on_stage_done: called when the gradients of a stage are complete; other stages may still compute.
        auxiliary_scale: factor of the gradients of auxiliary losses.

    Returns:
        Sums of the losses of all stages, the same on every rank; auxiliary ones without their factor.
    """
    numbers = torch.arange(len(inputs), device=mesh.device.torch)

    def loss(output: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        return loss_of(int(number), output)

    sums = LossSums.zeros(model, mesh.device.torch)
    modules = [_StageModule(model, stage, inputs, sums, auxiliary_scale) for stage in model.stages]
    parts = [
        _Stage(model, mesh, module, inputs, recorder, on_last_backward, on_stage_done) for module in modules
    ]
    name = mesh.layout.schedule
    if name == "1f1b" and len(inputs) < mesh.layout.pp:
        # With fewer micro-batches than stages 1F1B is all forward, then all backward, which torch calls GPipe.
        name = "gpipe"
    schedule = SCHEDULES[name](
        parts if len(parts) > 1 else parts[0], len(inputs), loss_fn=loss, scale_grads=False
    )
    losses: list[torch.Tensor] = []
    entering = (numbers,) if model.has_first else ()
    schedule.step(*entering, target=numbers, losses=losses, return_outputs=False)
    for part in losses:
        sums.loss.add_(part.detach())
    mesh.sum_over("pp", sums.loss)
    for auxiliary in sums.auxiliary.values():
        mesh.sum_over("pp", auxiliary)
    return sums


class _StageModule(nn.Module):
    """A stage that takes the number of a micro-batch where the model takes its tokens.

    Args:
        model: what the stage is of.
        stage: which.
        inputs: of every micro-batch.
        sums: where its auxiliary losses are added up.
        auxiliary_scale: factor of their gradients.

    Attributes:
        number: of the micro-batch that runs next.
    """

    def __init__(
        self,
        model: Transformer,
        stage: Stage,
        inputs: Sequence[ModelInput],
        sums: LossSums,
        auxiliary_scale: float,
    ) -> None:
        super().__init__()
        # The parameters of this stage alone: schedules that compute weight gradients apart ask for them.
        self.parts = nn.ModuleList(model.modules_of(stage))
        self.stage, self.number = stage, 0
        self._run, self._inputs = model.run_stage, inputs
        self._sums, self._auxiliary_scale = sums, auxiliary_scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1] -> hidden states or logits in the first stage; hidden states -> the same or logits in the others."""
        hidden = None if self.stage.is_first else x
        out, losses = self._run(self.stage, self._inputs[self.number], hidden)
        self._sums.add(losses)
        return attach_losses(out, losses, self._auxiliary_scale)


class _Receives(dict[int, Any]):
    """What a stage receives into, by micro-batch: a shape alone until the message is due.

    torch makes the buffers of all micro-batches of a step when the step begins.
    """

    def __setitem__(self, micro_batch: int, infos: Any) -> None:
        super().__setitem__(micro_batch, infos)
        self.release(micro_batch)

    def release(self, micro_batch: int) -> None:
        """Let go of the buffers of a micro-batch."""
        for info in self.get(micro_batch, ()):
            buffer = getattr(info, "buffer", None)
            if buffer is not None:
                info.buffer = torch.empty_like(buffer, device="meta", requires_grad=buffer.requires_grad)

    def allocate(self, micro_batch: int, rows: int, device: torch.device) -> None:
        """Make the buffers of a micro-batch, for its number of rows."""
        for info in self.get(micro_batch, ()):
            buffer = getattr(info, "buffer", None)
            if buffer is not None:
                shape = (rows, *buffer.shape[1:])
                info.buffer = torch.empty(
                    shape, dtype=buffer.dtype, device=device, requires_grad=buffer.requires_grad
                )


class _Stage(PipelineStage):
    """A stage that holds the messages of those micro-batches that are on their way, whatever their sizes.

    Shapes are known, so torch need not run the model to learn them. This is the only place that touches torch's private
    tables of buffers (`tests/core/test_pipeline_schedules.py`).
    """

    def __init__(
        self,
        model: Transformer,
        mesh: ParallelMesh,
        module: _StageModule,
        inputs: Sequence[ModelInput],
        recorder: Recorder | None,
        on_last: Callable[[Stage], None] | None,
        on_done: Callable[[Stage], None] | None,
    ) -> None:
        self._recorder, self._on_last, self._on_done = recorder, on_last, on_done
        self._module, stage = module, module.stage
        self._sizes = [given.tokens.shape[0] for given in inputs]
        dtype = next(model.parameters()).dtype
        first = inputs[0].tokens
        hidden = torch.empty(hidden_shape(first, model, mesh), dtype=dtype, device="meta")
        output = torch.empty(output_shape(first, model, mesh), dtype=dtype, device="meta")
        number = torch.empty(1, dtype=torch.long, device="meta")
        super().__init__(
            self._module,
            stage.index,
            stage.count,
            mesh.device.torch,
            input_args=number if stage.is_first else hidden.requires_grad_(),
            output_args=(output if stage.is_last else hidden).requires_grad_(),
            group=mesh.group("pp"),
        )
        self._inputs, self._gradients = _Receives(), _Receives()
        self.args_recv_info, self.grad_recv_info = self._inputs, self._gradients

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """Run one forward."""
        self._module.number = fwd_chunk_id
        with self._noted("forward", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run one backward, or only its gradient of the input."""
        if full_backward:
            self._report_if_last(last_backward)
        with self._noted("backward" if full_backward else "input gradient", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        self._inputs.release(bwd_chunk_id)
        self._gradients.release(bwd_chunk_id)
        if full_backward:
            if loss is not None:
                # torch keeps the losses of a step, and with their graphs what the stage was given.
                loss.detach_()
            self._report_if_done(last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Run the gradients of the weights that a backward left out."""
        self._report_if_last(last_backward)
        with self._noted("weight gradient", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
            # torch writes these gradients itself, so that autograd does not call who waits for them.
            for parameter in self.submod.parameters():
                if parameter.grad is not None:
                    for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                        hook(parameter)
        self._report_if_done(last_backward)

    def _report_if_last(self, is_last: bool) -> None:
        if is_last and self._on_last:
            self._on_last(self._module.stage)

    def _report_if_done(self, is_last: bool) -> None:
        if is_last and self._on_done:
            self._on_done(self._module.stage)

    def _noted(self, kind: Kind, micro_batch: int) -> AbstractContextManager[None]:
        return self._recorder.note(kind, self.stage_index, micro_batch) if self._recorder else nullcontext()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        """Return the receives of one forward."""
        self._inputs.allocate(fwd_chunk_id, self._sizes[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        """Return the receives of one backward."""
        self._gradients.allocate(bwd_chunk_id, self._sizes[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        """Return the sends of one forward, of numbers alone: torch before 2.13 keeps what is sent, and with an output
        its graph and the input of the stage."""
        operations = super().get_fwd_send_ops(fwd_chunk_id)
        for operation in operations:
            operation.tensor = operation.tensor.detach()
        return operations

    def _validate_fwd_outputs(self, outputs: tuple[torch.Tensor, ...]) -> None:
        """Nothing: torch before 2.13 asks that all micro-batches have the size of the first."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Return the first messages to the neighbours, without those to this rank itself, which gloo cannot send:
        torch before 2.13 has them where two neighbouring stages share a rank."""
        own = dist.get_rank(self.group)
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != own]
