"""The mesh: axes are data, groups are asked for by their names, and ranks are numbered as Megatron-LM numbers them."""

import pytest
import torch
import torch.distributed as dist

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import ConfigError
from support.processes import WorkerPool


def test_ranks_are_numbered_as_in_megatron_lm() -> None:
    """tp varies fastest, then cp, dp and pp."""
    layout = Layout(tp=2, cp=3, dp=2, pp=2)
    numbers = [(pp, dp, cp, tp) for pp in range(2) for dp in range(2) for cp in range(3) for tp in range(2)]
    found = [tuple(layout.index(rank, axis) for axis in ("pp", "dp", "cp", "tp")) for rank in range(24)]
    assert found == numbers
    assert [layout.index(rank, "replicas") for rank in range(24)] == [dp * 3 + cp for _, dp, cp, _ in numbers]


def test_groups_along_axes() -> None:
    layout = Layout(tp=2, cp=2, dp=2)
    assert layout.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("dp", "cp") == layout.groups("replicas") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert layout.groups("dp", "tp") == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert layout.size("dp", "cp") == layout.replicas == 4
    assert layout.spanned("pp", "cp") == ("cp",)
    with pytest.raises(
        ConfigError, match="the mesh has no axis xp; its axes and their unions are pp, dp, cp, tp, edp"
    ):
        layout.size("xp")


def test_ranks_of_experts_are_counted_in_another_way() -> None:
    layout = Layout(dp=4, ep=2, cp=2)
    assert layout.world_size == 8
    assert [layout.index(rank, "dp") for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert layout.groups("ep") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("edp") == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_an_axis_in_pieces() -> None:
    """Four experts' ranks that begin within tp and end within dp."""
    layout = Layout(tp=4, dp=4, ep=4, etp=2, pp=3)
    assert layout.axes == {"pp": 3, "dp_1": 2, "dp_0": 2, "tp_1": 2, "tp_0": 2} | {"cp": 1}
    assert list(layout.axes.values()) == [3, 2, 2, 1, 2, 2]
    plain = Layout(tp=4, dp=4, pp=3)
    for axis in ("pp", "tp", "dp", "replicas"):
        assert layout.groups(axis) == plain.groups(axis)
    assert layout.groups("etp")[:3] == [[0, 1], [2, 3], [4, 5]]
    assert layout.groups("ep")[0] == [0, 2, 4, 6]
    assert layout.groups("experts")[0] == list(range(8))
    assert layout.groups("edp")[0] == [0, 8]


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ({"tp": 2, "dp": 4, "ep": 3, "etp": 1}, "divides or is a multiple of 2 and 8"),
        ({"tp": 2, "dp": 2, "ep": 8, "etp": 1}, "no more than the 4 ranks of a stage"),
        ({"tp": 4, "dp": 3, "ep": 2}, "divides or is a multiple of 4 and 12"),
    ],
)
def test_experts_that_ranks_cannot_share(sizes: dict[str, int], rule: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot share the experts of a layer on tp.*{rule}"):
        assert Layout(**sizes).axes


def ranks_of_groups(layout: Layout, asked: list[tuple[str, ...]]) -> list[list[int] | None]:
    """The ranks in each group that was asked for, and that a sum over it is theirs."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    found: list[list[int] | None] = []
    for names in asked:
        group = mesh.group(*names)
        found.append(dist.get_process_group_ranks(group) if group is not None else None)
        total = mesh.sum_over(names, torch.tensor(float(mesh.rank)))
        assert float(total) == sum(found[-1] or [mesh.rank])
    return found


@pytest.mark.parametrize("layout", [Layout(dp=2, cp=2), Layout(tp=2, dp=2), Layout(dp=4, ep=2)], ids=str)
def test_process_groups(workers: WorkerPool, layout: Layout) -> None:
    asked = [("tp",), ("dp",), ("cp",), ("replicas",), ("dp", "cp")]
    asked += [("ep",), ("edp",), ("etp",), ("experts",)]
    for rank, found in enumerate(workers.run(ranks_of_groups, layout.world_size, layout, asked)):
        for names, ranks in zip(asked, found, strict=True):
            (wanted,) = (group for group in layout.groups(*names) if rank in group)
            assert ranks == (wanted if len(wanted) > 1 else None), names


def group_without_a_name(layout: Layout) -> None:
    with pytest.raises(ConfigError, match="the mesh has no group over dp x tp; add them to the unions"):
        ParallelMesh.create(Device("cpu"), layout).group("tp", "dp")


def test_a_group_that_no_union_names(workers: WorkerPool) -> None:
    workers.run(group_without_a_name, 4, Layout(tp=2, dp=2))
