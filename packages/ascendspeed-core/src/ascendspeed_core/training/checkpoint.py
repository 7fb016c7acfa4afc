"""Write and read the checkpoints of a run; their layout is described in `weights.native`.

A checkpoint is written into a folder whose name says that it is incomplete, and renamed when all of it is on the
disk; the tracker is replaced last. A run that dies while saving leaves the previous checkpoint as it was.
"""

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core import __version__
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.loss_scale import LossScale
from ascendspeed_core.training.optimizer import MasterOptimizer
from ascendspeed_core.weights.load import local_index
from ascendspeed_core.weights.native import (
    DESCRIPTION,
    FORMAT_VERSION,
    ITERATION_FOLDER,
    TRACKER,
    NativeSource,
)
from ascendspeed_core.weights.source import CheckpointError
from ascendspeed_data.command_line import log
from ascendspeed_data.files import INCOMPLETE, write_durably


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        iteration: steps done.
        consumed_samples: samples taken from the training data.
        skipped_samples: of these, samples of steps that an fp16 overflow skipped; the schedule did not see them.
        optimizer_steps: updates of the weights.
        data_order: options that decide the order of samples; under others the position means nothing.
        order_digest: digest of the samples that were consumed; empty before the data is built.
    """

    iteration: int
    consumed_samples: int
    skipped_samples: int
    optimizer_steps: int
    data_order: Mapping[str, Any]
    order_digest: str = ""


def save_checkpoint(
    run_folder: Path,
    progress: Progress,
    model: Transformer,
    optimizer: MasterOptimizer,
    run_config: Mapping[str, Any],
    mesh: ParallelMesh,
    loss_scale: LossScale | None = None,
) -> Path:
    """Write one checkpoint; all processes take part.

    Args:
        run_folder: folder of the run.
        progress: where the run stands.
        model: weights, with the architecture.
        optimizer: its state.
        run_config: the resolved config of the run, as JSON values.
        mesh: the layout.
        loss_scale: of fp16 training.

    Returns:
        The checkpoint's folder.
    """
    final = run_folder / f"iter_{progress.iteration:07d}"
    scratch = final.with_name(final.name + INCOMPLETE)
    if mesh.rank == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    mesh.barrier()
    _save_tensors(scratch, model, optimizer, mesh)
    mesh.barrier()
    if mesh.rank == 0:
        description = {
            "format_version": FORMAT_VERSION,
            "ascendspeed_core": __version__,
            "torch": torch.__version__,
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "skipped_samples": progress.skipped_samples,
            "optimizer_steps": progress.optimizer_steps,
            "data_order": dict(progress.data_order),
            "order_digest": progress.order_digest,
            "layout": asdict(mesh.layout),
            "loss_scale": loss_scale.state() if loss_scale else None,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "model": model.config.model_dump(mode="json"),
            "run": dict(run_config),
        }
        write_durably(scratch / DESCRIPTION, json.dumps(description, indent=2) + "\n")
        if final.exists():
            shutil.rmtree(final)
        scratch.rename(final)
        write_durably(run_folder / TRACKER, f"{progress.iteration}\n")
    mesh.barrier()
    return final


def _save_tensors(folder: Path, model: Transformer, optimizer: MasterOptimizer, mesh: ParallelMesh) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors: dict[str, Any] = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer.state().items()}
    tensors[f"rng/{mesh.rank}"] = torch.get_rng_state()
    writer = FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    with warnings.catch_warnings():
        # One process without a process group is a layout like any other.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(tensors, storage_writer=writer, no_dist=mesh.mesh is None)


def load_progress(source: NativeSource) -> Progress:
    """Return where the run that wrote a checkpoint stood."""
    try:
        return Progress(
            **{key: source.description[key] for key in (field.name for field in fields(Progress))}
        )
    except KeyError as error:
        raise CheckpointError(
            f"{source.folder / DESCRIPTION} lacks {error}; use another checkpoint"
        ) from None


def load_optimizer(source: NativeSource, optimizer: MasterOptimizer, num_steps: int) -> None:
    """Read this process's slices of the optimizer state, whatever layout wrote them.

    Raises:
        CheckpointError: a tensor is missing.
    """
    stored = set(source.stored.names())
    slices = {}
    for name in optimizer.state():
        full_name = f"optimizer/{name}"
        if full_name in stored:
            slices[name] = source.stored.read(full_name, local_index(optimizer.parameter_of(name)))
        elif not name.startswith("master/"):
            raise CheckpointError(
                f"{source.folder} lacks {full_name}; give --no-load-optim to start with a fresh optimizer"
            )
    optimizer.load_state(slices, num_steps)


def load_random_state(source: NativeSource, mesh: ParallelMesh) -> None:
    """Take over this rank's random state; under another number of processes new ranks are left as seeded."""
    name = f"rng/{mesh.rank}"
    if source.description["layout"] != asdict(mesh.layout) or (name not in source.stored.names()):
        if mesh.rank == 0:
            log("random state: the layout changed, each rank keeps the one seeded for it")
        return
    torch.set_rng_state(source.stored.read(name))


def saved_iterations(run_folder: Path) -> list[int]:
    """Return the iterations of all complete checkpoints in a run's folder, ascending."""
    found = []
    for path in run_folder.glob("iter_*"):
        match = ITERATION_FOLDER.fullmatch(path.name)
        if match and (path / DESCRIPTION).is_file():
            found.append(int(match.group(1)))
    return sorted(found)
