"""Start a command in several processes, and give each its place.

Under torchrun the environment says who a process is. With `--nproc-per-node N` this module starts torch's own
elastic launcher, which runs the same command again with that environment.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

from ascendspeed_core.device import Device, choose_device, prepare_torch
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError

LAUNCHED = "ASCENDSPEED_LAUNCHED"
"""Set in processes that this module started: their parent reports the error of the first that failed."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and which one this is."""

    size: int
    rank: int
    local_rank: int


def world_of_environment() -> World:
    """Return what torchrun said; without it, one process alone."""
    return World(
        size=int(os.environ.get("WORLD_SIZE", "1")),
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )


def is_worker() -> bool:
    """Tell whether a launcher, torchrun or ours, started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def announce(message: str) -> None:
    """Log a line that every process would find out before the run, once: in the launcher, or in torchrun's rank 0."""
    if not is_worker() or (LAUNCHED not in os.environ and world_of_environment().rank == 0):
        log(message)


def planned_world_size(nproc_per_node: int) -> int:
    """Return how many processes the run will have.

    Raises:
        ConfigError: both torchrun and `--nproc-per-node` were used.
    """
    if is_worker():
        if nproc_per_node > 1 and LAUNCHED not in os.environ:
            raise ConfigError(
                f"nproc_per_node={nproc_per_node} under torchrun would start processes twice; leave it out"
            )
        return world_of_environment().size
    return nproc_per_node


def launch(
    module: str,
    args: Sequence[str],
    nproc_per_node: int,
    device: str,
    kept: Callable[[], str] = lambda: "run the same command again",
) -> int:
    """Run `python -m module args` in several processes on this machine and wait for them.

    Args:
        module: importable name with a `__main__` block.
        args: the command line, `--nproc-per-node` included.
        nproc_per_node: processes.
        device: as asked for; decides how torch is imported.
        kept: called after a signal has stopped them; returns what is kept and how to go on.

    Returns:
        0, or the exit status of the first process that failed.

    Raises:
        AscendSpeedError: a process failed; the message is its own.
    """
    prepare_torch(device)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc_per_node, 1)))
    # Time to save after SIGTERM.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    _quiet_elastic()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc_per_node,
        run_id=f"ascendspeed-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", module, *args)
    except (SignalException, ProcessLookupError) as caught:
        # The launcher passes a signal on to processes that may have ended by themselves.
        error = caught if isinstance(caught, SignalException) else caught.__context__
        if not isinstance(error, SignalException):
            raise
        name = "Ctrl-C" if error.sigval == signal.SIGINT else error.sigval.name
        raise _WorkerError(
            f"stopped by {name}, all {nproc_per_node} processes with it; {kept()}",
            128 + error.sigval,
        ) from None
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        message = failure.message if isinstance(failure.message, str) else str(failure.message.get("message"))
        if (
            failure.exitcode in (1, 2, 128 + signal.SIGTERM, 128 + signal.SIGINT)
            and failure.error_file != "<NA>"
        ):
            raise _WorkerError(message, failure.exitcode) from None
        raise AscendSpeedError(
            f"process {rank} of {nproc_per_node} ended with status {failure.exitcode}; its output is above"
        ) from None
    return 0


class _WorkerError(AscendSpeedError):
    """An error that a worker reported, or a signal, with the exit status that belongs to it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def worker_errors() -> Iterator[None]:
    """Hand an error of this process to the launcher that started it, which prints it once for all.

    Without such a launcher the error goes on as it is.
    """
    if LAUNCHED in os.environ and is_worker():
        _end_with_launcher()
        # Ranks wait for each other, so one that is interrupted cannot end in order: all end at once, and the launcher
        # says what is kept. Training saves first, see `training.signals`.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    except AscendSpeedError as error:
        if not _has_launcher():
            if is_worker():
                raise _WorkerError(f"[rank {world_of_environment().rank}] {error}", error.exit_code) from None
            raise
        end_process(error)


def _has_launcher() -> bool:
    """Whether this process was started by `launch`, which prints its error."""
    return LAUNCHED in os.environ and "TORCHELASTIC_ERROR_FILE" in os.environ


def end_process(error: AscendSpeedError) -> NoReturn:
    """End this process at once, from whatever thread, with an error for its launcher, or printed without one."""
    if _has_launcher():
        _write_error_file(os.environ["TORCHELASTIC_ERROR_FILE"], str(error))
    else:
        log(f"error: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(error.exit_code)


def _end_with_launcher() -> None:
    """Ask Linux to kill this process when the launcher dies, which a killed launcher cannot do itself.

    Workers left behind would go on writing into the run's folder.
    """
    if sys.platform == "linux":
        import ctypes

        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _write_error_file(path: str, message: str) -> None:
    import json
    import time
    from pathlib import Path

    report = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
    Path(path).write_text(json.dumps(report), encoding="utf-8")


@contextmanager
def process_group(
    device: str, timeout_seconds: float = 600.0, even_alone: bool = False
) -> Iterator[tuple[World, Device]]:
    """Join the processes of the run, and leave at the end.

    Args:
        device: as asked for.
        timeout_seconds: until a process that hears nothing of another gives up.
        even_alone: make a group for a single process too.

    Yields:
        This process's place, and its device.
    """
    world = world_of_environment()
    chosen = choose_device(device, world.local_rank, quiet=world.rank != 0)
    if world.size == 1 and not even_alone:
        yield world, chosen
        return
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_seconds)
    with _stdout_for_results():
        if world.size == 1:
            alone = dist.HashStore()  # type: ignore[attr-defined] # public, but not listed
            dist.init_process_group(chosen.backend, store=alone, rank=0, world_size=1, timeout=timeout)
        else:
            try:
                dist.init_process_group(chosen.backend, timeout=timeout)
            except dist.DistError as error:
                reason = str(error).partition("\n")[0]
                raise AscendSpeedError(
                    f"the {world.size} processes of the run did not find each other: {reason}"
                ) from None
        try:
            yield world, chosen
        finally:
            dist.destroy_process_group()


@contextmanager
def _stdout_for_results() -> Iterator[None]:
    """Send to standard error what libraries write to the process's standard output: gloo of torch 2.10 says there who
    is connected. What Python prints goes where it went."""
    import ctypes

    outside = sys.stdout
    try:
        number = outside.fileno()
    except OSError:
        # Somebody reads what Python prints, and not the process's output.
        yield
        return
    outside.flush()
    kept = os.dup(number)
    os.dup2(sys.stderr.fileno(), number)
    sys.stdout = os.fdopen(kept, "w", encoding=outside.encoding, errors=outside.errors)
    try:
        yield
    finally:
        sys.stdout.flush()
        # What libraries have not written yet goes the same way.
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, number)
        sys.stdout.close()
        sys.stdout = outside


def _quiet_elastic() -> None:
    """Keep the launcher's own log lines and traceback away; the error of the worker is what matters."""
    import logging

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
