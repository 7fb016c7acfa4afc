"""One pool of worker processes for a whole test session.

Importing torch and the trainer takes seconds of processor time, so it happens once: workers are forked from a server
that has imported them, and stay. They are sent cases: functions by import path, with their arguments. Each case gets a
fresh gloo group of just the size that it asks for.
"""

import gc
import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

SECONDS_PER_CASE = 240
IMPORTED_ONCE = ("torch.distributed.checkpoint", "ascendspeed_core.training.trainer", "transformers")
"""What most cases import. With OMP_NUM_THREADS=1, as nox sets it, this starts no thread, so forking is safe."""


class WorkerPool:
    """Worker processes, started as they are needed.

    Args:
        start_method: `spawn` gives them the environment of the moment they start; forked ones have that of the server.
    """

    def __init__(self, start_method: Literal["forkserver", "spawn"] = "forkserver") -> None:
        self._start_method = start_method
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="asd-tests-")
        self._cases = 0

    def run(self, case: Callable[..., Any], world_size: int, *args: Any, **kwargs: Any) -> list[Any]:
        """Run `case(*args, **kwargs)` in `world_size` processes of one group; return what each rank returned."""
        while len(self._connections) < world_size:
            self._start_worker()
        self._cases += 1
        rendezvous_file = Path(self._folder.name) / f"case{self._cases}"
        for rank in range(world_size):
            self._connections[rank].send(
                (case.__module__, case.__qualname__, rank, world_size, str(rendezvous_file), args, kwargs)
            )
        results, failures = [], []
        for rank in range(world_size):
            if not self._connections[rank].poll(SECONDS_PER_CASE):
                failures.append(f"rank {rank} gave no answer in {SECONDS_PER_CASE} s")
                continue
            try:
                ok, value = self._connections[rank].recv()
            except EOFError:
                ok, value = False, "died"
            (results if ok else failures).append(value if ok else f"rank {rank}: {value}")
        if failures:
            self.close()
            self.__init__(self._start_method)  # type: ignore[misc]
            raise AssertionError("\n".join(failures))
        return results

    def _start_worker(self) -> None:
        context = multiprocessing.get_context(self._start_method)
        if self._start_method == "forkserver":
            context.set_forkserver_preload(list(IMPORTED_ONCE))
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, sys.path), daemon=True)
        process.start()
        self._connections.append(ours)
        self._processes.append(process)

    def close(self) -> None:
        """End all workers."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(connection: Connection, path: list[str]) -> None:
    sys.path[:] = path
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    gc.freeze()
    while True:
        try:
            module, name, rank, world_size, rendezvous_file, args, kwargs = connection.recv()
        except EOFError:
            return
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        try:
            dist.init_process_group(
                "gloo", init_method=f"file://{rendezvous_file}", rank=rank, world_size=world_size
            )
            connection.send((True, getattr(importlib.import_module(module), name)(*args, **kwargs)))
        except BaseException:  # noqa: BLE001 - the traceback goes to the test
            connection.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            # A group that a cycle of references keeps has threads that spin once its peers are gone.
            gc.collect()
