"""A LoRA adapter beside the weights: each layer adds `scale B A x` to what it gives, and its weight stays as it is.

Merging is the default, as it costs nothing per token; unmerged, the weights are those of the checkpoint bit for bit,
and nothing is rounded to their format. Under tensor parallelism A and B are cut as the weight is: B by rows in
column-parallel layers, A by columns in row-parallel ones, whose r numbers per token are added up over the devices.

Shapes: I input and O output size of a layer, r rank.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.build import parameter_slices
from ascendspeed_core.parallel.collectives import sum_over_group
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.slices import ROW_PARALLEL
from ascendspeed_core.weights.adapter import Adapter, hugging_face_places
from ascendspeed_data.errors import AscendSpeedError, ConfigError


def attach_adapter(model: Transformer, mesh: ParallelMesh, adapter: Adapter) -> None:
    """Let the layers that an adapter changes add its part, in place.

    Args:
        model: this process's part, its projections not joined.
        mesh: its place.
        adapter: it fits the model, see `MergedAdapter`.

    Raises:
        ConfigError: a layout with sequence parallelism.
        AscendSpeedError: it changes something that is no linear layer.
    """
    if mesh.layout.sequence_parallel:
        raise ConfigError("an adapter beside the weights does not go with sequence_parallel; leave one out")
    slices = parameter_slices(model, mesh)
    for name, place in hugging_face_places(model.config).items():
        update = adapter.updates.get(place.theirs.removesuffix(".weight"))
        if update is None or not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        if update.is_embedding or (module == "output_head" and model.config.normalised_head):
            raise AscendSpeedError(
                f"{adapter.folder} changes {place.theirs}, which is no plain linear layer; merge the adapter"
            )
        if name not in slices:
            continue
        linear = model.get_submodule(module)
        assert isinstance(linear, nn.Linear)
        wide = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        rows, columns = slices[name].index
        b = update.b if place.rows is None else update.b[place.rows]
        is_summed = module.endswith(ROW_PARALLEL)
        linear.forward = partial(  # type: ignore[method-assign]
            _forward_with_adapter,
            linear.forward,
            update.a[:, columns].to(linear.weight.device, wide),
            (b[rows].to(wide) * update.scale).to(linear.weight.device),
            mesh.group("tp") if is_summed else None,
        )


def _forward_with_adapter(
    forward: Callable[[torch.Tensor], torch.Tensor],
    a: torch.Tensor,
    b: torch.Tensor,
    group: dist.ProcessGroup | None,
    x: torch.Tensor,
) -> torch.Tensor:
    """Add what the adapter gives: [..., I] -> [..., O]; `a` is [r, I], `b` [O, r] with the scale in it."""
    low = F.linear(x.to(a.dtype), a)
    if group is not None:
        low = sum_over_group(low, group)
    out = forward(x)
    return out + F.linear(low, b).to(out.dtype)
