"""This rank's coordinates among all ranks, and the process groups it talks to."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ascendspeed_core.config.layout import V_SCHEDULES, Layout
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.collectives import all_reduce_sum
from ascendspeed_data.errors import ConfigError


@dataclass(frozen=True)
class ParallelMesh:
    """The layout, this rank's coordinates in it, and the process groups along its axes.

    Attributes:
        device: the device of this rank.
        layout: sizes of the axes.
        mesh: torch's mesh with the axes of the layout, or `None` for a single process.
        embedding_group: first and last stage of this pipeline, which share a tied embedding; `None` in those between,
            and where one rank has both.
    """

    device: Device
    layout: Layout
    mesh: DeviceMesh | None = None
    embedding_group: dist.ProcessGroup | None = None
    _unions: dict[tuple[str, ...], dist.ProcessGroup] = field(default_factory=dict)
    _tp_subgroups: dict[int, dist.ProcessGroup] = field(default_factory=dict)

    @classmethod
    def create(cls, device: Device, layout: Layout) -> "ParallelMesh":
        """Make the mesh; `torch.distributed` must be initialised unless the layout is one process."""
        if layout.world_size == 1:
            return cls(device, layout)
        axes = layout.axes
        mesh = init_device_mesh(device.kind, tuple(axes.values()), mesh_dim_names=tuple(axes))
        return cls(device, layout, mesh, _make_embedding_group(layout), _make_union_groups(layout))

    @property
    def rank(self) -> int:
        """Number of this rank among all."""
        return dist.get_rank() if self.mesh is not None else 0

    def index(self, *names: str) -> int:
        """Return the number of this rank among those along some axes or unions of the layout together."""
        return self.layout.index(self.rank, *names)

    @property
    def pp_rank(self) -> int:
        """Which stages of the pipeline this rank holds."""
        return self.index("pp")

    @property
    def dp_rank(self) -> int:
        """Which share of the batch this rank takes."""
        return self.index("dp")

    @property
    def cp_rank(self) -> int:
        """Which part of every sequence this rank has."""
        return self.index("cp")

    @property
    def replica(self) -> int:
        """Which of the ranks with the same weights this is."""
        return self.index("replicas")

    @property
    def tp_rank(self) -> int:
        """Which part of each layer this rank holds."""
        return self.index("tp")

    def group(self, *names: str) -> dist.ProcessGroup | None:
        """Return the group of this rank along some axes or unions together; `None` when it is alone there.

        Args:
            names: of axes and unions of the layout, such as `"tp"`, `"replicas"`, or `"dp", "cp"`. Several axes
                together have a group if the layout names their union.
        """
        axes = self.layout.spanned(*names)
        if self.mesh is None or not axes:
            return None
        if len(axes) == 1:
            return self.mesh.get_group(axes[0])
        if axes not in self._unions:
            raise ConfigError(
                f"the mesh has no group over {' x '.join(axes)}; add them to the unions of the layout"
            )
        return self._unions[axes]

    def tp_subgroup(self, count: int) -> dist.ProcessGroup:
        """Return the group of `count` neighbouring tensor-parallel ranks; all processes ask together."""
        for axis, size in (("tp", self.layout.tp), ("etp", self.layout.expert_tp)):
            group = self.group(axis) if count == size else None
            if group is not None:
                return group
        if count not in self._tp_subgroups:
            for first in range(0, self.layout.world_size, count):
                ranks = list(range(first, first + count))
                group = dist.new_group(ranks)
                if self.rank in ranks:
                    self._tp_subgroups[count] = group
        return self._tp_subgroups[count]

    def sum_over(self, names: str | tuple[str, ...], tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` along some axes or unions together, in place."""
        group = self.group(*((names,) if isinstance(names, str) else names))
        if group is not None:
            all_reduce_sum(tensor, group)
        return tensor

    def sum_over_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place."""
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


def _make_union_groups(layout: Layout) -> dict[tuple[str, ...], dist.ProcessGroup]:
    """Make the groups of the layout's unions, on all processes alike; return those of this process by axes."""
    made: dict[tuple[str, ...], dist.ProcessGroup] = {}
    for union in layout.unions:
        axes = layout.spanned(union)
        if len(axes) > 1 and axes not in made:
            group = _make_group(layout.groups(*axes))
            assert group is not None
            made[axes] = group
    return made


def _make_embedding_group(layout: Layout) -> dist.ProcessGroup | None:
    """Make the group of first and last stage of every pipeline, on all processes alike; return this process's."""
    if layout.pp == 1 or layout.schedule in V_SCHEDULES:
        return None
    return _make_group([[ranks[0], ranks[-1]] for ranks in layout.groups("pp")])


def _make_group(groups: list[list[int]]) -> dist.ProcessGroup | None:
    """Make a process group of each list of ranks, on all processes alike; return the one with this process, if any."""
    mine: dist.ProcessGroup | None = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return mine
