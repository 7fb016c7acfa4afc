"""Pipeline parallelism: the layers cut into stages, micro-batches flowing through them.

Training runs torch's 1F1B schedule (Narayanan et al., 2021, PipeDream-Flush): after a warm-up each stage does one
forward and one backward in turn, so that a stage keeps the activations of at most `pp` micro-batches. Each
micro-batch enters as its number; the first stage looks its tokens up, the loss its labels, so nothing but hidden
states travels.

Shapes: B micro-batch size, S sequence length, H hidden size, V vocabulary. Hidden states are [B, S, H], with sequence
parallelism [B, S/tp, H].
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from ascendspeed_core.models.cache import KeyValueCache
from ascendspeed_core.models.transformer import Transformer, following_positions
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.slices import rounded_share


class _StageModule(nn.Module):
    """A stage that takes the number of a micro-batch where the model takes its tokens."""

    def __init__(self, model: Transformer, tokens: list[torch.Tensor]) -> None:
        super().__init__()
        self.model, self._tokens = model, tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[1] -> hidden states or logits in the first stage; hidden states -> the same or logits in the others."""
        inputs = self._tokens[int(x)] if self.model.stage.is_first else x
        out: torch.Tensor = self.model(inputs, following_positions(self._tokens[0], None))
        return out


def run_pipeline(
    model: Transformer,
    mesh: ParallelMesh,
    tokens: list[torch.Tensor],
    loss_of: Callable[[int, torch.Tensor], torch.Tensor],
    backward: bool,
) -> torch.Tensor:
    """Run micro-batches through all stages; with `backward`, gradients are added to the parameters.

    Args:
        model: this process's stage.
        mesh: its place.
        tokens: ids of every micro-batch, all of one shape, [B, S].
        loss_of: number of a micro-batch and its logits -> scalar; called in the last stage.
        backward: whether gradients are wanted.

    Returns:
        Sum of the losses, float64, the same on every stage.
    """
    count = len(tokens)
    numbers = torch.arange(count, device=mesh.device.torch)
    stage = _stage(model, mesh, tokens)

    def loss(output: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        return loss_of(int(number), output)

    # With fewer micro-batches than stages 1F1B is all forward, then all backward, which torch calls GPipe.
    schedule_type = Schedule1F1B if count >= mesh.layout.pp else ScheduleGPipe
    schedule = schedule_type(stage, count, loss_fn=loss, scale_grads=False)
    losses: list[torch.Tensor] = []
    inputs = (numbers,) if model.stage.is_first else ()
    run: Any = schedule.step if backward else schedule.eval
    run(*inputs, target=numbers, losses=losses, return_outputs=False)
    total = torch.zeros((), dtype=torch.float64, device=mesh.device.torch)
    for part in losses:
        total += part.detach()
    return mesh.sum_over("pp", total)


def _stage(model: Transformer, mesh: ParallelMesh, tokens: list[torch.Tensor]) -> PipelineStage:
    """Describe this process's stage; shapes are known, so torch need not run the model to learn them."""
    config = model.config
    batch, length = tokens[0].shape
    dtype = next(model.parameters()).dtype
    hidden = torch.empty(hidden_shape(tokens[0], model, mesh), dtype=dtype, device="meta")
    mine = rounded_share(config.vocab_size, mesh.layout.tp, mesh.tp_rank)
    logits = torch.empty(batch, length, mine.stop - mine.start, dtype=dtype, device="meta")
    return PipelineStage(
        _StageModule(model, tokens),
        model.stage.index,
        model.stage.count,
        mesh.device.torch,
        input_args=torch.empty(1, dtype=torch.long, device="meta")
        if model.stage.is_first
        else hidden.requires_grad_(),
        output_args=(logits if model.stage.is_last else hidden).requires_grad_(),
        group=mesh.group("pp"),
    )


def hidden_shape(tokens: torch.Tensor, model: Transformer, mesh: ParallelMesh) -> tuple[int, int, int]:
    """Return the shape of what travels between stages for tokens, [B, S]."""
    batch, length = tokens.shape
    cut = mesh.layout.tp if mesh.layout.sequence_parallel else 1
    return batch, length // cut, model.config.hidden_size


@torch.no_grad()
def forward_through_stages(
    model: Transformer, mesh: ParallelMesh, tokens: torch.Tensor, cache: KeyValueCache | None = None
) -> torch.Tensor:
    """Return this device's logits, [B, S, V/tp], on every stage; no gradient flows.

    Args:
        model: this process's stage, or the whole model.
        mesh: its place.
        tokens: ids, [B, S], the same on every stage.
        cache: earlier keys and values of this stage's layers.
    """
    group = mesh.group("pp")
    if group is None:
        logits: torch.Tensor = model(tokens, cache=cache)
        return logits
    stage, config = model.stage, model.config
    dtype = next(model.parameters()).dtype
    x = tokens
    if not stage.is_first:
        x = torch.empty(hidden_shape(tokens, model, mesh), dtype=dtype, device=tokens.device)
        dist.recv(x, group=group, group_src=stage.index - 1)
    out: torch.Tensor = model(x, following_positions(tokens, cache), cache)
    if not stage.is_last:
        dist.send(out.contiguous(), group=group, group_dst=stage.index + 1)
        mine = rounded_share(config.vocab_size, mesh.layout.tp, mesh.tp_rank)
        out = torch.empty(*tokens.shape, mine.stop - mine.start, dtype=dtype, device=tokens.device)
    out = out.contiguous()
    dist.broadcast(out, group=group, group_src=stage.count - 1)
    return out
