"""Find out which ranks see the same folder: a run may use several machines, and not every folder is on all."""

import uuid
from pathlib import Path

import torch.distributed as dist

from ascendspeed_core.parallel.mesh import ParallelMesh


def sees_folder_of_rank_0(folder: Path, mesh: ParallelMesh) -> bool:
    """Return whether `folder` is the same here and on rank 0; all ranks call together.

    Rank 0 makes the folder if it is not there.
    """
    if mesh.mesh is None:
        return True
    token: list[str] = [uuid.uuid4().hex]
    dist.broadcast_object_list(token, src=0)
    mark = folder / f".seen-{token[0]}"
    if mesh.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    mesh.barrier()
    # Listing the folder makes network file systems look again.
    seen = folder.is_dir() and mark in folder.iterdir()
    mesh.barrier()
    if mesh.rank == 0:
        mark.unlink()
    return seen
