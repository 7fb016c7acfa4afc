"""Run a model over tokens and read logits only where they are wanted.

The head is the largest matrix of a small model and the logits the largest tensor of any: scoring needs them at a few
places of each text.

Shapes: B batch, S sequence, P places, V vocabulary, H hidden size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from ascendspeed_core.models.cache import KeyValueCache
from ascendspeed_core.models.transformer import Transformer, following_positions
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.pipeline import forward_through_stages, hidden_shape
from ascendspeed_core.parallel.slices import rounded_share


@torch.no_grad()
def logits_at(
    model: Transformer,
    mesh: ParallelMesh,
    tokens: torch.Tensor,
    places: torch.Tensor,
    cache: KeyValueCache | None = None,
) -> torch.Tensor:
    """Return this device's logits at some places of each text, [B, P, V/tp], on every stage.

    Args:
        model: this process's stage, or the whole model.
        mesh: its place.
        tokens: ids, [B, S], the same on every stage.
        places: of the logits wanted, [B, P].
        cache: earlier keys and values of this stage's layers.
    """
    if mesh.layout.sequence_parallel:
        # The last norm has a part of each text only, so places mean nothing there.
        everywhere = forward_through_stages(model, mesh, tokens, cache)
        return everywhere.gather(1, places.unsqueeze(-1).expand(-1, -1, everywhere.shape[-1]))
    group = mesh.group("pp")
    with _reading_at(model, places):
        if group is None:
            logits: torch.Tensor = model(tokens, cache=cache)
            return logits
        stage, dtype = model.stage, next(model.parameters()).dtype
        x = tokens
        if not stage.is_first:
            x = torch.empty(hidden_shape(tokens, model, mesh), dtype=dtype, device=tokens.device)
            dist.recv(x, group=group, group_src=stage.index - 1)
        out: torch.Tensor = model(x, following_positions(tokens, cache), cache)
    if not stage.is_last:
        dist.send(out.contiguous(), group=group, group_dst=stage.index + 1)
        mine = rounded_share(model.config.vocab_size, mesh.layout.tp, mesh.tp_rank)
        out = torch.empty(*places.shape, mine.stop - mine.start, dtype=dtype, device=tokens.device)
    out = out.contiguous()
    dist.broadcast(out, group=group, group_src=stage.count - 1)
    return out


@contextmanager
def _reading_at(model: Transformer, places: torch.Tensor) -> Iterator[None]:
    """Let the last norm, and with it the head, see some places only."""
    if model.final_norm is None:
        yield
        return

    def pick(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        (x,) = inputs
        return (x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1])),)

    hook = model.final_norm.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()


def make_cache(
    model: Transformer, mesh: ParallelMesh, batch_size: int, capacity_tokens: int
) -> KeyValueCache:
    """Return an empty cache for this process's heads."""
    config = model.config
    return KeyValueCache(
        num_layers=len(model.layers),
        batch_size=batch_size,
        capacity_tokens=capacity_tokens,
        num_key_value_heads=max(config.num_key_value_heads // mesh.layout.tp, 1),
        head_dim=config.head_dim,
        dtype=next(model.parameters()).dtype,
        device=mesh.device.torch,
    )
