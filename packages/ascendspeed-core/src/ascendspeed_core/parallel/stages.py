"""A forward pass through pipeline stages, for evaluation and inference: one micro-batch, no gradient.

Shapes: B micro-batch size, S sequence length (S/cp under context parallelism), V vocabulary. Hidden states are
[B, S, H], with sequence parallelism [B, S/tp, H].
"""

import torch
import torch.distributed as dist

from ascendspeed_core.config.layout import stages_of_ranks
from ascendspeed_core.config.sharding import chunk_range
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh


def hidden_shape(tokens: torch.Tensor, model: Transformer, mesh: ParallelMesh) -> tuple[int, int, int]:
    """Return the shape of what travels between stages for tokens, [B, S]."""
    batch, length = tokens.shape
    cut = mesh.layout.tp if mesh.layout.sequence_parallel else 1
    return batch, length // cut, model.config.hidden_size


def logits_shape(tokens: torch.Tensor, model: Transformer, mesh: ParallelMesh) -> tuple[int, int, int]:
    """Return the shape of this rank's logits for tokens, [B, S]."""
    mine = chunk_range(model.config.vocab_size, mesh.layout.tp, mesh.tp_rank)
    return tokens.shape[0], tokens.shape[1], mine.stop - mine.start


def output_shape(tokens: torch.Tensor, model: Transformer, mesh: ParallelMesh) -> tuple[int, int, int]:
    """Return the shape of what the last stage gives for a loss, see `ModelInput.for_loss`."""
    return (hidden_shape if model.loss_from_hidden else logits_shape)(tokens, model, mesh)


@torch.no_grad()
def forward_through_stages(
    model: Transformer, mesh: ParallelMesh, batch: ModelInput, is_shared: bool = True
) -> torch.Tensor:
    """Return this rank's logits, [B, S, V/tp], on every stage; no gradient flows.

    Args:
        model: this rank's stages, or the whole model.
        mesh: the mesh, with this rank's coordinates.
        batch: what the model reads, the same on every stage.
        is_shared: send the logits to all stages; without it only the rank of the last stage has them (others get
            hidden states), and consecutive calls overlap.
    """
    read_at = batch.read_at
    if read_at is not None and mesh.layout.sequence_parallel:
        # Indexes count in whole rows, of which the last norm has a part here.
        everywhere = forward_through_stages(model, mesh, batch._replace(read_at=None), is_shared)
        return everywhere.gather(1, read_at.unsqueeze(-1).expand(-1, -1, everywhere.shape[-1]))
    group = mesh.group("pp")
    if group is None:
        logits: torch.Tensor = model(batch).logits
        return logits
    dtype = next(model.parameters()).dtype
    holder = _holders(model, mesh)
    tokens, out = batch.tokens, batch.tokens
    for stage in model.stages:
        if not stage.is_first and holder[stage.index - 1] != mesh.pp_rank:
            out = torch.empty(hidden_shape(tokens, model, mesh), dtype=dtype, device=tokens.device)
            dist.recv(out, group=group, group_src=holder[stage.index - 1])
        out, _ = model.run_stage(stage, batch, None if stage.is_first else out)
        if not stage.is_last and holder[stage.index + 1] != mesh.pp_rank:
            dist.send(out.contiguous(), group=group, group_dst=holder[stage.index + 1])
    if not is_shared:
        return out
    if not model.has_last:
        shape = logits_shape(tokens if read_at is None else read_at, model, mesh)
        out = torch.empty(shape, dtype=dtype, device=tokens.device)
    out = out.contiguous()
    dist.broadcast(out, group=group, group_src=holder[-1])
    return out


def _holders(model: Transformer, mesh: ParallelMesh) -> list[int]:
    """Return by stage the pipeline rank that holds it."""
    held = stages_of_ranks(model.config.num_layers, mesh.layout)
    return [rank for _, rank in sorted((stage.index, rank) for rank, own in enumerate(held) for stage in own)]
