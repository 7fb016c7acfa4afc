"""Tensor parallelism: every layer cut over devices, applied to a plain model by a plan.

Attention and MLP each are a column-parallel cut (rows of the weight, [out/tp, in]) followed by a row-parallel one
([out, in/tp]); between them no device needs another (Shoeybi et al., 2019, Megatron-LM, section 3). One
all-reduce ends each half of a layer; going back, one all-reduce gathers the gradient of its input. Embedding and
head are cut along the vocabulary, which need not divide evenly.

The cutting itself is torch's DTensor; parameters keep their logical shape and name.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from ascendspeed_core.models.transformer import Transformer

TOP_PLAN: dict[str, ParallelStyle] = {
    "embedding": RowwiseParallel(input_layouts=Replicate()),
    "output_head": ColwiseParallel(output_layouts=Shard(-1)),
}
"""Embedding and head; the head leaves each device its part of the vocabulary, [B, S, V/tp]."""

LAYER_PLAN: dict[str, ParallelStyle] = {
    # The input becomes a DTensor once, so that the gradients of q, k and v are added before they are all-reduced.
    "attention": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
    "attention.q_proj": ColwiseParallel(),
    "attention.k_proj": ColwiseParallel(),
    "attention.v_proj": ColwiseParallel(),
    "attention.o_proj": RowwiseParallel(),
    "mlp": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Cut `model` over the devices of `mesh` (one dimension), in place.

    Args:
        model: on the meta device or filled; heads and MLP width must divide by the mesh's size.
        mesh: the `tp` dimension.

    Returns:
        The same model; `model(tokens)` now gives this device's logits, [B, S, V/tp].
    """
    parallelize_module(model, mesh, TOP_PLAN)
    for layer in model.layers.values():
        parallelize_module(layer, mesh, LAYER_PLAN)
    model.tie_weights()
    return model


def vocabulary_slice(vocab_size: int, tp: int, tp_rank: int) -> slice:
    """Return the ids whose rows a device holds; as torch cuts, the last devices may hold fewer."""
    share = -(-vocab_size // tp)
    return slice(min(tp_rank * share, vocab_size), min((tp_rank + 1) * share, vocab_size))


def gather_logits(logits: torch.Tensor, vocab_size: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Put the parts of the vocabulary together: [..., V/tp] -> [..., V] on every device. No gradient flows."""
    if group is None:
        return logits
    tp, rank = dist.get_world_size(group), dist.get_rank(group)
    share = -(-vocab_size // tp)
    padded = logits.new_zeros((*logits.shape[:-1], share))
    mine = vocabulary_slice(vocab_size, tp, rank)
    padded[..., : mine.stop - mine.start] = logits
    parts = [torch.empty_like(padded) for _ in range(tp)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat(parts, dim=-1)[..., :vocab_size]
