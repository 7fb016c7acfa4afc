"""Context parallelism: every sequence cut over ranks, for texts too long for one device.

Everything but attention works on each token alone, so a rank computes its S/cp tokens of every sequence. Attention
needs all tokens but only one head at a time: an all-to-all gives each rank the whole sequence of N/cp heads, and a
second one gives the results back (Jacobs et al., 2023, DeepSpeed Ulysses, section 3.1). Together they move 4/cp times
the bytes of the hidden states, less the more ranks there are, and any implementation of attention, mask, rotary
embedding or ALiBi stays as it is. Weights are the same on all ranks of cp, which add up their gradients as
data-parallel ones do.

Shapes: B batch, S sequence, H hidden size, D head size, N query heads and K key-value heads that tensor parallelism
left to this rank, P = max(K, cp) key-value heads after copying.
"""

from functools import partial

import torch
import torch.distributed as dist

from ascendspeed_core.kernels.reference import AttentionFunction, Mask
from ascendspeed_core.models.attention import Attention
from ascendspeed_core.models.position import Positions
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.collectives import swap_cut

HEADS, SEQUENCE = 1, 2
"""Dimensions of queries, keys, values and results."""


def apply_context_parallel(model: Transformer, group: dist.ProcessGroup) -> None:
    """Make `model` work on one part of every sequence, in place; after tensor parallelism is applied.

    The model then takes this rank's tokens, [B, S/cp], and gives their logits.

    Args:
        model: heads must fit, see `ParallelConfig.check_model`.
        group: ranks that share each sequence, in order of its parts.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    cut_positions(model.positions, size, rank)
    for layer in model.layers.values():
        attention = layer.get_submodule("attention")
        assert isinstance(attention, Attention)
        attention.attention_wrapper = partial(attend_with_some_heads, group=group)


def cut_positions(positions: Positions, size: int, rank: int) -> None:
    """Make positions those of one of `size` parts of every sequence, with a share of the heads, in place."""
    positions.sequence_parts, positions.sequence_part = size, rank
    share = len(positions.heads) // size
    first = positions.heads.start + rank * share
    positions.heads = range(first, first + share)


def attend_with_some_heads(
    attend: AttentionFunction,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask,
    group: dist.ProcessGroup,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend to whole sequences with this rank's share of the heads.

    Args:
        attend: implementation of `causal_attention`.
        q: [B, N, S/cp, D].
        k: [B, K, S/cp, D]; K divides cp or is a multiple of it.
        v: [B, K, S/cp, D].
        mask: for whole sequences and this rank's share of the heads.
        group: the ranks.
        sinks: of `reference_attention`, [N], where the model has them.

    Returns:
        [B, N, S/cp, D].
    """
    size = dist.get_world_size(group)
    if k.shape[HEADS] < size:
        # Each rank needs the one head that its query heads look at; the gradients of the copies are added up.
        copies = size // k.shape[HEADS]
        k, v = k.repeat_interleave(copies, HEADS), v.repeat_interleave(copies, HEADS)
    shares = [x.unflatten(HEADS, (size, -1)) for x in (q, k, v)]
    heads = [share.shape[2] for share in shares]
    # One message to each rank: [B, cp, (N + 2P)/cp, S/cp, D] -> [B, (N + 2P)/cp, S, D].
    together = swap_cut(torch.cat(shares, 2).flatten(1, 2), HEADS, SEQUENCE, group)
    q, k, v = together.split(heads, HEADS)
    if sinks is not None:
        attend = partial(attend, sinks=sinks.chunk(size)[dist.get_rank(group)])
    attended = attend(q, k, v, mask)
    return swap_cut(attended, SEQUENCE, HEADS, group)


def part_of_sequence(x: torch.Tensor, parts: int, part: int) -> torch.Tensor:
    """Return one part of what belongs to the tokens of samples: [B, S] -> [B, S/cp]."""
    return x.chunk(parts, dim=1)[part] if parts > 1 else x
