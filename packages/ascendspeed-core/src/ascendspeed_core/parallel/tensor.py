"""Tensor parallelism: every layer cut over devices, applied to a plain model from outside.

Attention and MLP each are a column-parallel cut (rows of the weight, [out/tp, in]) followed by a row-parallel one
([out, in/tp]); between them no device needs another (Shoeybi et al., 2019, Megatron-LM, section 3). One
all-reduce ends each half of a layer; going back, one all-reduce adds up the gradient of its input. Embedding and
head are cut along the vocabulary, which need not divide evenly.

Parameters become DTensors, which keep the logical shape and name and say which slice is here; optimizer and
checkpoints rely on that. The arithmetic runs on the local slices with collectives spelled out: DTensor's own
dispatch costs about 0.2 ms for each operation on it, several times more than the operation in small models.

Shapes: B batch, S sequence, H hidden size, V vocabulary.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.collectives import copy_to_group, sum_over_group

COLUMN_PARALLEL = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.gate_proj", "mlp.up_proj")
"""Linear layers of a transformer layer that are cut along their output."""

ROW_PARALLEL = ("attention.o_proj", "mlp.down_proj")
"""Linear layers that are cut along their input; their results are added up."""

ENTRANCES = ("attention", "mlp")
"""Modules whose input is the same everywhere and whose inside is cut."""


def apply_tensor_parallel(model: Transformer, mesh: DeviceMesh) -> Transformer:
    """Cut `model` over the devices of `mesh` (one dimension), in place.

    Args:
        model: on the meta device or filled; heads and MLP width must divide by the mesh's size.
        mesh: the `tp` dimension.

    Returns:
        The same model; `model(tokens)` now gives this device's logits, [B, S, V/tp].
    """
    for layer in model.layers.values():
        for name in COLUMN_PARALLEL:
            cut_columns(_linear(layer, name), mesh)
        for name in ROW_PARALLEL:
            cut_rows(_linear(layer, name), mesh)
        for name in ENTRANCES:
            share_input(layer.get_submodule(name), mesh)
    if model.embedding is not None:
        cut_vocabulary(model.embedding, mesh)
    if model.output_head is not None:
        cut_columns(model.output_head, mesh)
        share_input(model.output_head, mesh)
    model.tie_weights()
    return model


def cut_columns(linear: nn.Linear, mesh: DeviceMesh) -> None:
    """Cut a linear layer along its output: [..., in] -> [..., out/tp], with no communication."""
    _cut_parameter(linear, "weight", mesh, 0)
    if linear.bias is not None:
        _cut_parameter(linear, "bias", mesh, 0)

    def forward(x: torch.Tensor) -> torch.Tensor:
        bias = None if linear.bias is None else _local(linear.bias)
        return F.linear(x, _local(linear.weight), bias)

    linear.forward = forward  # type: ignore[method-assign, assignment]


def cut_rows(linear: nn.Linear, mesh: DeviceMesh) -> None:
    """Cut a linear layer along its input: [..., in/tp] -> [..., out], the parts added up; a bias stays whole."""
    _cut_parameter(linear, "weight", mesh, 1)
    group = mesh.get_group()

    def forward(x: torch.Tensor) -> torch.Tensor:
        total = sum_over_group(F.linear(x, _local(linear.weight)), group)
        return total if linear.bias is None else total + linear.bias

    linear.forward = forward  # type: ignore[method-assign, assignment]


def cut_vocabulary(embedding: nn.Embedding, mesh: DeviceMesh) -> None:
    """Cut an embedding along its rows: [B, S] -> [B, S, H]; each id is looked up where its row is."""
    _cut_parameter(embedding, "weight", mesh, 0)
    group = mesh.get_group()
    mine = vocabulary_slice(embedding.num_embeddings, mesh.size(), mesh.get_local_rank())

    def forward(ids: torch.Tensor) -> torch.Tensor:
        elsewhere = (ids < mine.start) | (ids >= mine.stop)
        weight = _local(embedding.weight)
        if weight.shape[0] == 0:
            rows = weight.new_zeros((*ids.shape, weight.shape[1]))
        else:
            rows = F.embedding((ids - mine.start).masked_fill(elsewhere, 0), weight)
            rows = rows.masked_fill(elsewhere.unsqueeze(-1), 0)
        return sum_over_group(rows, group)

    embedding.forward = forward  # type: ignore[method-assign, assignment]


def share_input(module: nn.Module, mesh: DeviceMesh) -> None:
    """Add up the gradient of a module's first argument over devices."""
    group = mesh.get_group()
    module.register_forward_pre_hook(lambda _, args: (copy_to_group(args[0], group), *args[1:]))


def vocabulary_slice(vocab_size: int, tp: int, tp_rank: int) -> slice:
    """Return the ids whose rows a device holds; as DTensor cuts, the last devices may hold fewer."""
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


def _cut_parameter(module: nn.Module, name: str, mesh: DeviceMesh, axis: int) -> None:
    whole = getattr(module, name)
    cut = distribute_tensor(whole.detach(), mesh, [Shard(axis)])
    setattr(module, name, nn.Parameter(cut, requires_grad=whole.requires_grad))


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _linear(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
