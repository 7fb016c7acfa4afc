"""Write and read the checkpoints of a run; their layout is described in `weights.native.source`.

A checkpoint is written into a folder whose name says that it is incomplete, and renamed when all of it is on the
disk; the tracker is replaced last. A run that dies while saving leaves the previous checkpoint as it was.

Of a model with adapters only what is trained is written, and beside it the same as an adapter in peft's format.

Every part of every tensor is written by one of the ranks that hold it, chosen so that they write equally much.
"""

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ascendspeed_core import __version__
from ascendspeed_core.config.migrate import FORMAT_VERSION as CONFIG_FORMAT_VERSION
from ascendspeed_core.config.migrate import VERSION_KEY, migrate_config
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.data.shared_filesystem import sees_folder_of_rank_0
from ascendspeed_core.device import HOST
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.optim.engine import Engine, TensorShard
from ascendspeed_core.optim.loss_scale import LossScale
from ascendspeed_core.optim.update_rule import optimizer_state_keys
from ascendspeed_core.parallel.mesh import ParallelMesh, gather_objects
from ascendspeed_core.weights.adapters.lora import description_of, plan_of
from ascendspeed_core.weights.adapters.write_peft import write_adapter
from ascendspeed_core.weights.files.distributed_writer import TensorFile, WrittenShard, write_metadata
from ascendspeed_core.weights.native.description import FORMAT_VERSION
from ascendspeed_core.weights.native.source import (
    DESCRIPTION,
    ITERATION_FOLDER,
    TRACKER,
    NativeSource,
)
from ascendspeed_core.weights.source import CheckpointError
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.stopping import NO_SPACE, no_space
from ascendspeed_data.files import INCOMPLETE, write_durably
from ascendspeed_data.hub import origins_in


@dataclass(frozen=True)
class TrainState:
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


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is complete.

    Attributes:
        newest: how many of the newest; `None` keeps all.
        interval: iterations whose multiples stay for ever.
    """

    newest: int | None = None
    interval: int | None = None

    def superseded(self, iterations: list[int]) -> list[int]:
        """Return which of the complete checkpoints, ascending, are to be removed."""
        if self.newest is None:
            return []
        return [n for n in iterations[: -self.newest] if not (self.interval and n % self.interval == 0)]


class CheckpointWriter:
    """Writes the checkpoints of one run; all ranks call it alike.

    Args:
        run_folder: folder of the run.
        mesh: the layout.
        retention: which earlier checkpoints stay.
        in_background: copy the tensors to the host and write while training goes on.
        on_saved: called with the folder, in the first process, when a checkpoint is complete.
        base: of a run that trains adapters, what they are trained on; the checkpoint names it.

    Raises:
        CheckpointError: the folder is not the same one for all ranks.
    """

    def __init__(
        self,
        run_folder: Path,
        mesh: ParallelMesh,
        retention: Retention | None = None,
        in_background: bool = False,
        on_saved: Callable[[Path], None] = lambda _: None,
        base: Path | None = None,
    ) -> None:
        self.run_folder, self._mesh = run_folder, mesh
        self._retention = retention or Retention()
        self._in_background, self._on_saved, self._base = in_background, on_saved, base
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._group: dist.ProcessGroup | None = None
        if mesh.mesh is not None:
            # A group of its own, so that writing may overlap training; a slow disk is no reason to give up.
            self._group = dist.new_group(backend=HOST.backend, timeout=timedelta(days=1))
        seen = gather_objects(sees_folder_of_rank_0(run_folder, mesh), mesh, self._group)
        if not all(seen):
            raise CheckpointError(
                f"save={run_folder} of rank {seen.index(False)} is not the folder of rank 0; give a path on a "
                "file system that all machines share"
            )

    def save(
        self,
        state: TrainState,
        model: Transformer,
        optimizer: Engine,
        run_config: Mapping[str, Any],
        loss_scale: LossScale | None = None,
    ) -> None:
        """Write one checkpoint, after the one before is complete.

        Args:
            state: where the run stands.
            model: weights, with the architecture.
            optimizer: what trains it; gives weights and optimizer state.
            run_config: the resolved config of the run, as JSON values.
            loss_scale: of fp16 training.

        Raises:
            CheckpointError: it could not be written, or the one before; what was complete is left as it was.
        """
        self.wait()
        tensors = _tensors_to_write(optimizer, self._mesh)
        description = {
            "format_version": FORMAT_VERSION,
            "ascendspeed_core": __version__,
            "torch": torch.__version__,
            "iteration": state.iteration,
            "consumed_samples": state.consumed_samples,
            "skipped_samples": state.skipped_samples,
            "optimizer_steps": state.optimizer_steps,
            "data_order": dict(state.data_order),
            "order_digest": state.order_digest,
            "layout": asdict(self._mesh.layout),
            "loss_scale": loss_scale.state() if loss_scale else None,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "model": model.config.model_dump(mode="json"),
            "run": {VERSION_KEY: CONFIG_FORMAT_VERSION, **run_config},
        }
        if origins := origins_in(dict(run_config)):
            description["hub"] = origins
        if model.adapters is not None:
            description["adapters"] = description_of(model.adapters, self._base)
        if not self._in_background:
            self._write(state.iteration, tensors, description)
            self.wait()
            return
        copies = [shard._replace(values=shard.values.to(HOST.torch, copy=True)) for shard in tensors]
        self._thread = threading.Thread(
            target=self._write, args=(state.iteration, copies, description), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error:
            raise CheckpointError(error)

    def _write(
        self,
        iteration: int,
        tensors: list[TensorShard],
        description: Mapping[str, Any],
    ) -> None:
        """Write everything; an error of any process becomes the error of all."""
        final = self.run_folder / f"iter_{iteration:07d}"
        scratch = final.with_name(final.name + INCOMPLETE)
        pieces: list[WrittenShard] = []

        def write_tensors() -> None:
            with TensorFile(scratch, self._mesh.rank) as file:
                for name, part, tensor in tensors:
                    file.add(name, tensor, part)
            pieces.extend(file.shards)

        def complete(everything: list[list[WrittenShard]]) -> None:
            write_metadata(scratch, [piece for of_rank in everything for piece in of_rank])
            if "adapters" in description:
                model = ModelConfig.model_validate(description["model"])
                write_adapter(
                    scratch, plan_of(description["adapters"]), model, description["adapters"]["base"]
                )
            write_durably(scratch / DESCRIPTION, json.dumps(description, indent=2) + "\n")
            if final.exists():
                shutil.rmtree(final)
            scratch.rename(final)
            write_durably(self.run_folder / TRACKER, f"{iteration}\n")
            self._on_saved(final)
            self._remove_old()

        is_first = self._mesh.rank == 0
        error = self._together(lambda: _fresh_folder(scratch) if is_first else None)
        error = error or self._together(write_tensors)
        if not error:
            everything = gather_objects(pieces, self._mesh, self._group)
            error = self._together(lambda: complete(everything) if is_first else None)
        self._error = error

    def _together(self, action: Callable[[], None]) -> str | None:
        """Do something on every rank, and return the error of the first that failed."""
        error = None
        try:
            action()
        except Exception as caught:  # noqa: BLE001 - reported to all ranks, and raised by `wait`
            reason = str(caught)
            if isinstance(caught, OSError) and caught.errno in NO_SPACE:
                reason = no_space(caught)
            error = (
                f"{self.run_folder}: the checkpoint could not be written: {reason}; "
                "earlier ones are as they were, and the same command with --auto-resume goes on from the newest"
            )
        return next((found for found in gather_objects(error, self._mesh, self._group) if found), None)

    def _remove_old(self) -> None:
        """Remove superseded checkpoints and what a killed run left half-written."""
        for iteration in self._retention.superseded(saved_iterations(self.run_folder)):
            folder = self.run_folder / f"iter_{iteration:07d}"
            folder.rename(folder.with_name(folder.name + INCOMPLETE))
        for folder in self.run_folder.glob(f"iter_*{INCOMPLETE}"):
            shutil.rmtree(folder)


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _tensors_to_write(engine: Engine, mesh: ParallelMesh) -> list[TensorShard]:
    """Return name, part and value of what this rank writes."""
    mine = engine.checkpoint_shards()
    mine.append(TensorShard(f"rng/{mesh.rank}", None, torch.get_rng_state()))
    device_state = mesh.device.rng_state()
    if device_state is not None:
        mine.append(TensorShard(f"device_rng/{mesh.rank}", None, device_state))
    return mine


def load_train_state(source: NativeSource) -> TrainState:
    """Return where the run that wrote a checkpoint stood."""
    return TrainState(
        **{key: source.description[key] for key in (field.name for field in fields(TrainState))}
    )


def check_optimizer(source: NativeSource, config: OptimizerConfig) -> None:
    """Check that a checkpoint holds what an optimizer remembers; `adam` and `fused_adam` remember the same.

    Raises:
        CheckpointError: another optimizer wrote it.
    """
    wanted = optimizer_state_keys(config)
    held = sorted({name.split("/")[1] for name in source.stored.names() if name.startswith("optimizer/")})
    lacking = [kind for kind in wanted if kind not in held]
    if lacking:
        run, _ = migrate_config(source.description.get("run", {}), str(source.folder / DESCRIPTION))
        section = run.get("optimizer")
        written_by = (section if isinstance(section, dict) else {}).get("optimizer", "another optimizer")
        raise CheckpointError(
            f"{source.folder} lacks the {' and '.join(lacking)} of --optimizer {config.optimizer}, it was written by "
            f"{written_by} and holds {', '.join(held) or 'no state'}; give the same --optimizer, or --no-load-optim to "
            "start with a fresh one"
        )


def load_optimizer(source: NativeSource, optimizer: Engine, num_steps: int) -> None:
    """Read this rank's slices of the optimizer state, whatever layout wrote them.

    Raises:
        CheckpointError: a tensor is missing.
    """
    stored = set(source.stored.names())
    parts = {}
    for name, wanted in optimizer.state_slices().items():
        full_name = f"optimizer/{name}"
        if full_name in stored:
            read = [source.stored.read(full_name, part.index) for part in wanted]
            parts[name] = read[0] if len(read) == 1 else torch.cat([part.flatten() for part in read])
        elif not name.startswith("master/"):
            raise CheckpointError(
                f"{source.folder} lacks {full_name}; give --no-load-optim to start with a fresh optimizer"
            )
    optimizer.load_state(parts, num_steps)


def load_random_state(source: NativeSource, mesh: ParallelMesh) -> None:
    """Take over this rank's random state; under another layout or kind of device ranks are left as seeded."""
    stored = source.stored.names()
    before, now = source.description["layout"], asdict(mesh.layout)
    # Checkpoints of versions before context parallelism name no cp.
    changed = any(before.get(size, 1) != now[size] for size in ("tp", "pp", "dp", "cp"))
    if changed or f"rng/{mesh.rank}" not in stored:
        if mesh.rank == 0:
            log("random state: the layout changed, each rank keeps the one seeded for it")
        return
    torch.set_rng_state(source.stored.read(f"rng/{mesh.rank}").clone())
    if mesh.device.rng_state() is None:
        return
    if f"device_rng/{mesh.rank}" in stored:
        mesh.device.set_rng_state(source.stored.read(f"device_rng/{mesh.rank}").clone())
    elif mesh.rank == 0:
        log(
            f"random state: the checkpoint has none of a {mesh.device.kind}, each rank keeps the one seeded for it"
        )


def saved_iterations(run_folder: Path) -> list[int]:
    """Return the iterations of all complete checkpoints in a run's folder, ascending."""
    found = []
    for path in run_folder.glob("iter_*"):
        match = ITERATION_FOLDER.fullmatch(path.name)
        if match and (path / DESCRIPTION).is_file():
            found.append(int(match.group(1)))
    return sorted(found)


def what_is_kept(save: Path | None) -> str:
    """Say what a run that ends early has kept, and how to go on."""
    if save is None:
        return "nothing of the run is kept, as no --save was given"
    saved = saved_iterations(save)
    if not saved:
        return f"{save} holds no checkpoint yet; run the same command again to start it"
    return f"{save} holds iteration {saved[-1]}; the same command with --auto-resume goes on from there"
