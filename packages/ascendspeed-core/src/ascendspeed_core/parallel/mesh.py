"""This process's place among all processes."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ascendspeed_core.config.parallel import V_SCHEDULES, Layout
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.collectives import all_reduce_sum


@dataclass(frozen=True)
class ParallelMesh:
    """The layout, this process's place in it, and the groups it talks to.

    Attributes:
        device: the device of this process.
        layout: sizes of the dimensions.
        mesh: torch's mesh with dimensions `pp`, `dp`, `cp` and `tp`, or `None` for a single process.
        embedding_group: first and last stage of this pipeline, which share a tied embedding; `None` in those between,
            and where one process has both.
        replicas: the processes that hold the same weights; `None` when this one is alone with them.
    """

    device: Device
    layout: Layout
    mesh: DeviceMesh | None = None
    embedding_group: dist.ProcessGroup | None = None
    replicas: dist.ProcessGroup | None = None
    _neighbours: dict[int, dist.ProcessGroup] = field(default_factory=dict)

    @classmethod
    def create(cls, device: Device, layout: Layout) -> "ParallelMesh":
        """Make the mesh; `torch.distributed` must be initialised unless the layout is one process."""
        if layout.world_size == 1:
            return cls(device, layout)
        shape = (layout.pp, layout.dp, layout.cp, layout.tp)
        mesh = init_device_mesh(device.kind, shape, mesh_dim_names=("pp", "dp", "cp", "tp"))
        return cls(device, layout, mesh, _make_embedding_groups(layout), _replicas(mesh, layout))

    @property
    def rank(self) -> int:
        """Number of this process among all."""
        return dist.get_rank() if self.mesh is not None else 0

    @property
    def pp_rank(self) -> int:
        """Which stage of the pipeline this process holds."""
        return self.mesh.get_local_rank("pp") if self.mesh is not None else 0

    @property
    def dp_rank(self) -> int:
        """Which share of the batch this process takes."""
        return self.mesh.get_local_rank("dp") if self.mesh is not None else 0

    @property
    def cp_rank(self) -> int:
        """Which part of every sequence this process has."""
        return self.mesh.get_local_rank("cp") if self.mesh is not None else 0

    @property
    def replica(self) -> int:
        """Which of the processes with the same weights this is."""
        return self.dp_rank * self.layout.cp + self.cp_rank

    @property
    def tp_rank(self) -> int:
        """Which part of each layer this process holds."""
        return self.mesh.get_local_rank("tp") if self.mesh is not None else 0

    def group(self, dimension: str) -> dist.ProcessGroup | None:
        """Return the processes along `pp`, `dp`, `cp`, `tp` or `replicas`; `None` when this one is alone there."""
        if self.mesh is None or getattr(self.layout, dimension) == 1:
            return None
        if dimension == "replicas":
            return self.replicas
        return self.mesh.get_group(dimension)

    def neighbours(self, count: int) -> dist.ProcessGroup:
        """Return the group of `count` neighbouring tensor-parallel devices; all processes ask together."""
        if count == self.layout.tp:
            assert self.mesh is not None
            return self.mesh.get_group("tp")
        if count not in self._neighbours:
            for first in range(0, self.layout.world_size, count):
                ranks = list(range(first, first + count))
                group = dist.new_group(ranks)
                if self.rank in ranks:
                    self._neighbours[count] = group
        return self._neighbours[count]

    def sum_over(self, dimension: str, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up along a dimension, in place."""
        group = self.group(dimension)
        if group is not None:
            all_reduce_sum(tensor, group)
        return tensor

    def sum_over_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add `tensor` up over all processes, in place."""
        if self.mesh is not None:
            assert dist.group.WORLD is not None
            all_reduce_sum(tensor, dist.group.WORLD)
        return tensor

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            dist.barrier()


def gather_objects(value: Any, mesh: ParallelMesh, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return what each process of a group has, by default of all processes; small Python values only."""
    if mesh.mesh is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _replicas(mesh: DeviceMesh, layout: Layout) -> dist.ProcessGroup | None:
    """Return the group over dp and cp, in order of `ParallelMesh.replica`; all processes ask together."""
    if layout.replicas == 1:
        return None
    if layout.cp == 1 or layout.dp == 1:
        return mesh.get_group("dp" if layout.cp == 1 else "cp")
    return mesh["dp", "cp"]._flatten("replicas").get_group()


def _make_embedding_groups(layout: Layout) -> dist.ProcessGroup | None:
    """Make the group of first and last stage of every pipeline, on all processes alike; return this process's."""
    if layout.pp == 1 or layout.schedule in V_SCHEDULES:
        return None
    per_stage = layout.tp * layout.replicas
    mine = None
    for first in range(per_stage):
        ranks = [first, first + (layout.pp - 1) * per_stage]
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine
