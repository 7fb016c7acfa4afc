"""Tensor and sequence parallelism: every layer partitioned over ranks, applied to a plain model from outside.

Attention and MLP each are column-parallel layers followed by a row-parallel one; between them no rank needs another
(Shoeybi et al., 2019, Megatron-LM, section 3). One all-reduce ends each block; going back, one all-reduce sums the
gradient of its input. Embedding and head are cut along the vocabulary, which need not divide evenly. Which module is
which says the table in `config.sharding`.

With sequence parallelism what stands between the blocks, norms and residuals, is cut along the sequence
(Korthikanti et al., 2022, section 4.2.2): an all-gather opens each block and a reduce-scatter ends it, which together
move as many bytes as the all-reduce. Weights outside the blocks, those of the norms, then see a part of the sequence
only; the optimizer sums their gradients.

Parameters are plain tensors of this rank's part. DTensor's dispatch costs about 0.2 ms for each operation, several
times more than the operation in small models, and it has no placement that replicates a head on some ranks only.

Shapes: B batch, S sequence, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.sharding import (
    Partition,
    chunk_range,
    module_sharding,
    query_heads,
    tensor_slice,
)
from ascendspeed_core.models.auxiliary_losses import AuxiliaryLosses
from ascendspeed_core.models.dropout import DropoutMasks
from ascendspeed_core.models.linear import LoraLinear
from ascendspeed_core.models.norm import AllHeadsNorm
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.auxiliary_losses import share_losses
from ascendspeed_core.parallel.collectives import (
    average_over_group,
    copy_to_group,
    gather_sequence,
    sum_over_group,
    sum_over_group_scattering_sequence,
)


@dataclass(frozen=True)
class _Border:
    """How hidden states enter and leave a partitioned block.

    Attributes:
        group: the tensor-parallel ranks.
        enter: whole hidden states from those between blocks.
        leave: hidden states between blocks from partial sums.
        share_losses: this rank's share of auxiliary losses that all of them computed alike.
    """

    group: dist.ProcessGroup
    enter: Callable[[torch.Tensor], torch.Tensor]
    leave: Callable[[torch.Tensor], torch.Tensor]
    share_losses: Callable[[AuxiliaryLosses], AuxiliaryLosses]


def apply_tensor_parallel(model: Transformer, group: dist.ProcessGroup, layout: Layout) -> None:
    """Make `model`, whose parameters are parts, compute with the other ranks of `group`, in place.

    `model(batch)` then gives this rank's logits, [B, S, V/tp]. With sequence parallelism hidden states between
    layers, and so between pipeline stages, are [B, S/tp, H].

    Args:
        model: after `shard_parameters`; sizes must fit, see `ParallelConfig.check_model`.
        group: ranks that share each layer.
        layout: of all ranks.
    """
    share = partial(share_losses, tp=layout.tp, is_sequence_cut=layout.sequence_parallel)
    if layout.sequence_parallel:
        border = _Border(
            group,
            partial(gather_sequence, group=group),
            partial(sum_over_group_scattering_sequence, group=group),
            share,
        )
    else:
        border = _Border(
            group, partial(copy_to_group, group=group), partial(sum_over_group, group=group), share
        )
    model.positions.heads = query_heads(model.config, layout.tp, dist.get_rank(group))
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, AllHeadsNorm):
            module.average = partial(average_over_group, group=group)
        sharding = module_sharding(name)
        # Experts give and take whole tokens, see `parallel.experts`.
        partition = sharding.partition if sharding is not None and sharding.axis == "tp" else None
        if partition in (Partition.COLUMN_PARALLEL, Partition.KEY_VALUE_HEADS):
            block = name.rpartition(".")[0]
            blocks[block] = model.get_submodule(block)
        elif partition is Partition.ROW_PARALLEL:
            _sum_results(module, border)
        elif partition is Partition.VOCABULARY and isinstance(module, nn.Embedding):
            _look_up_in_parts(module, model.config.vocab_size, border)
        elif partition is Partition.VOCABULARY:
            _share_input(module, border)
            model.enter_head = border.enter
    for block_module in blocks.values():
        # Column-parallel layers of a block read the same input, so it is shared, and its gradient summed, once.
        _share_input(block_module, border)


def gather_logits(logits: torch.Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Put the parts of the vocabulary together: [..., V/tp] -> [..., V] on every rank. No gradient flows."""
    if group is None:
        return logits
    tp, rank = dist.get_world_size(group), dist.get_rank(group)
    share = -(-vocab_size // tp)
    padded = logits.new_zeros((*logits.shape[:-1], share))
    mine = chunk_range(vocab_size, tp, rank)
    padded[..., : mine.stop - mine.start] = logits
    parts = [torch.empty_like(padded) for _ in range(tp)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat(parts, dim=-1)[..., :vocab_size]


def shard_parameters(model: Transformer, layout: Layout, tp_rank: int, etp_rank: int) -> None:
    """Leave to each parameter this rank's part, in place; on the meta device or filled."""
    for name, whole in list(model.named_parameters()):
        part = tensor_slice(name, tuple(whole.shape), model.config, layout, tp_rank, etp_rank=etp_rank)
        if part.sizes != part.shape:
            owner, _, kind = name.rpartition(".")
            setattr(model.get_submodule(owner), kind, nn.Parameter(whole.detach()[part.index].clone()))
            layer, _, half = owner.rpartition(".")
            if half == "lora_A":
                adapted = model.get_submodule(layer)
                assert isinstance(adapted, LoraLinear)
                adapted.first_column = part.index[1].start
    model.tie_weights()


def _share_input(module: nn.Module, border: _Border) -> None:
    """Give a block whole hidden states; the gradient of its first argument is summed over the ranks."""
    module.register_forward_pre_hook(lambda _, args: (border.enter(args[0]), *args[1:]))
    if getattr(module, "auxiliary_losses", ()):
        module.register_forward_hook(lambda _, __, output: (output[0], border.share_losses(output[1])))


def _sum_results(linear: nn.Module, border: _Border) -> None:
    """Sum the partial outputs of a row-parallel layer, [..., in/tp] -> [..., out]; the bias is added once."""
    assert isinstance(linear, nn.Linear)

    def forward(x: torch.Tensor, draws: DropoutMasks | None = None) -> torch.Tensor:
        share = linear.product(x, draws) if isinstance(linear, LoraLinear) else F.linear(x, linear.weight)
        total = border.leave(share)
        return total if linear.bias is None else total + linear.bias

    linear.forward = forward  # type: ignore[method-assign, assignment]


def _look_up_in_parts(embedding: nn.Embedding, vocab_size: int, border: _Border) -> None:
    """Look each id up on the rank that holds its row: [B, S] -> [B, S, H]."""
    mine = chunk_range(vocab_size, dist.get_world_size(border.group), dist.get_rank(border.group))

    def forward(ids: torch.Tensor) -> torch.Tensor:
        elsewhere = (ids < mine.start) | (ids >= mine.stop)
        weight = embedding.weight
        if weight.shape[0] == 0:
            rows = weight.new_zeros((*ids.shape, weight.shape[1]))
        else:
            rows = F.embedding((ids - mine.start).masked_fill(elsewhere, 0), weight)
            rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
        return border.leave(rows)

    embedding.forward = forward  # type: ignore[method-assign, assignment]
