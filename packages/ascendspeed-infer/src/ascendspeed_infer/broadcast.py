"""What only the first process can know, on all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

from ascendspeed_core.parallel.mesh import ParallelMesh

Value = TypeVar("Value")


def from_first(mesh: ParallelMesh, make: Callable[[], Value]) -> Value:
    """Return what `make` gives on the first process, on every process; small Python values only."""
    if mesh.mesh is None:
        return make()
    import torch.distributed as dist

    box: list[Any] = [make() if mesh.rank == 0 else None]
    dist.broadcast_object_list(box, src=0, device=mesh.device.torch)
    value: Value = box[0]
    return value
