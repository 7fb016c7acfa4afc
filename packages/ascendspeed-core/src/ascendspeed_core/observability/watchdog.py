"""End a run that hangs, and say which rank is to blame and where it hangs.

When one process hangs, all others soon wait for it in a collective, for ever or until a time-out whose message names
none of them. Here a thread of each rank notices that its rank makes no progress, and then all tell each other
where their main threads stand, over a store of their own, which no hanging collective can block. Who does not wait
for others, or does not answer, is the one that the others wait for.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from ascendspeed_core.launch import end_process
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh, gather_objects
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError

WAITING = ("/torch/distributed/", "/ascendspeed_core/parallel/collectives.py")
"""Files whose functions wait for other processes; compared with the innermost frame of a stack."""

DEVICE_WAITING = "synchronize"
"""Name of the function that waits for the device."""

FRAMES = 12
"""Innermost frames of a stack that are printed."""

GRACE_SECONDS = 5.0
"""How long to wait for the statuses of the other ranks."""

POLL_SECONDS = 0.01
"""Between two checks for them."""

LATER_KILL = """
import os, signal, sys, time
time.sleep(2)
for process in map(int, sys.argv[1:]):
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""
"""Ends processes once the launcher knows why."""


@dataclass(frozen=True)
class RankStatus:
    """What a rank is doing.

    Attributes:
        rank: which.
        iteration: the step that it is in.
        activity: the last layer that it began, or what else it does.
        heartbeats: layers that it has begun so far.
        innermost: `file:line in function` of its main thread.
        is_waiting: whether that function waits for other ranks.
        stack: innermost frames of its main thread, as lines.
    """

    rank: int
    iteration: int
    activity: str
    heartbeats: int
    innermost: str
    is_waiting: bool
    stack: tuple[str, ...]


class Watchdog:
    """Watches this rank, together with those of the others; all ranks construct it alike.

    Args:
        mesh: of this rank.
        timeout_seconds: without progress, until the run is ended.
        model: a layer that begins is progress.
    """

    def __init__(self, mesh: ParallelMesh, timeout_seconds: float, model: Transformer) -> None:
        self._mesh, self._timeout = mesh, timeout_seconds
        self._interval = min(max(timeout_seconds / 10, 0.1), 5.0)
        self._main = threading.get_ident()
        self._iteration, self._activity, self._heartbeats = 0, "", 0
        self._last: float | None = None
        self._done = threading.Event()
        self._store = _store(mesh)
        self._processes: list[tuple[str, int]] = gather_objects((socket.gethostname(), os.getpid()), mesh)
        self._hooks = [
            layer.register_forward_pre_hook(self._heartbeat_at(f"layers.{number}"))
            for number, layer in model.layers.items()
        ]
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer; when the run is being ended, that comes first."""
        self._done.set()
        self._thread.join()
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def watching(self, iteration: int, what: str) -> Iterator[None]:
        """Expect progress inside; outside, as when a checkpoint is written, none is expected."""
        self._iteration = iteration
        self._heartbeat(what)
        try:
            yield
        finally:
            self._last = None

    def _heartbeat_at(self, activity: str) -> Any:
        return lambda *_: self._heartbeat(activity)

    def _heartbeat(self, activity: str) -> None:
        self._activity, self._heartbeats = activity, self._heartbeats + 1
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            last = self._last
            is_idle = last is not None and time.monotonic() - last > self._timeout
            try:
                if is_idle and self._store is not None:
                    self._store.set("alarm", str(self._mesh.rank))
                if is_idle or (self._store is not None and self._store.check(["alarm"])):
                    self._end(self._gather_statuses())
            except DistError as error:
                if not self._done.wait(self._interval):
                    log(f"watchdog of rank {self._mesh.rank}: rank 0 is gone ({error}); nothing is watched")
                return

    def _gather_statuses(self) -> list[RankStatus]:
        """Report what this rank does, and return the statuses of all that answer in time."""
        mine = self._status()
        if self._store is None:
            return [mine]
        self._store.set(f"status/{mine.rank}", json.dumps(asdict(mine)))
        keys = [f"status/{rank}" for rank in range(self._mesh.layout.world_size)]
        self._wait_for(keys, max(GRACE_SECONDS, 2 * self._interval))
        statuses = [json.loads(self._store.get(key)) for key in keys if self._store.check([key])]
        return [RankStatus(**status) for status in statuses]

    def _leave_together(self, statuses: list[RankStatus]) -> None:
        """Wait until all that answered have read the statuses: the first to leave breaks the others' connections."""
        if self._store is None:
            return
        # The store goes with process 0, which leaves when all are ready.
        with suppress(DistError):
            self._store.set(f"leaves/{self._mesh.rank}", "")
            self._wait_for([f"leaves/{status.rank}" for status in statuses], GRACE_SECONDS)

    def _wait_for(self, keys: list[str], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._store.check(keys) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def _status(self) -> RankStatus:
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        inner = frames[-1]
        return RankStatus(
            self._mesh.rank,
            self._iteration,
            self._activity,
            self._heartbeats,
            f"{inner.filename}:{inner.lineno} in {inner.name}",
            inner.name == DEVICE_WAITING or any(part in inner.filename for part in WAITING),
            tuple(line.rstrip() for line in traceback.format_list(frames[-FRAMES:])),
        )

    def _end(self, statuses: list[RankStatus]) -> None:
        world = self._mesh.layout.world_size
        message, blamed = verdict(statuses, world, self._timeout)
        is_reporter = self._mesh.rank == min(status.rank for status in statuses)
        if is_reporter:
            for status in blamed:
                log(f"stack of rank {status.rank}, innermost call last:\n" + "\n".join(status.stack))
        self._leave_together(statuses)
        if is_reporter:
            self._kill_unresponsive(set(range(world)) - {status.rank for status in statuses})
        end_process(AscendSpeedError(message))

    def _kill_unresponsive(self, ranks: set[int]) -> None:
        """End processes of this machine that do not answer: they would not react to a gentler signal either.

        A moment later, by a process that outlives this one: a launcher that finds one of them dead before it has our
        message would blame that one's signal.
        """
        here = [
            process
            for host, process in map(self._processes.__getitem__, ranks)
            if host == socket.gethostname()
        ]
        if here:
            subprocess.Popen(
                [sys.executable, "-I", "-c", LATER_KILL, *map(str, here)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )


def verdict(
    statuses: Sequence[RankStatus], world_size: int, timeout_seconds: float
) -> tuple[str, list[RankStatus]]:
    """Return the message that names who hangs, and their statuses.

    Args:
        statuses: of the ranks that answered.
        world_size: number of ranks.
        timeout_seconds: how long there was no progress.
    """
    unresponsive = sorted(set(range(world_size)) - {status.rank for status in statuses})
    busy = [status for status in statuses if not status.is_waiting]
    waiting = [status for status in statuses if status.is_waiting]
    parts = [f"rank {rank} does not answer: it is stopped, or stuck outside Python" for rank in unresponsive]
    parts += [f"rank {a.rank} stands in iteration {a.iteration}, {a.activity}: {a.innermost}" for a in busy]
    blamed = busy
    if not parts:
        least = min(status.heartbeats for status in statuses)
        blamed = [status for status in statuses if status.heartbeats == least]
        parts = ["all ranks wait for each other or for their device; furthest behind:"]
        parts += [f"rank {a.rank} in iteration {a.iteration}, {a.activity}: {a.innermost}" for a in blamed]
    elif waiting:
        ranks = ", ".join(str(status.rank) for status in waiting)
        parts.append(f"rank{'s' * (len(waiting) > 1)} {ranks} wait{'s' * (len(waiting) == 1)} for others")
    listed = "; ".join(parts).replace("behind:;", "behind:")
    return f"no progress for {timeout_seconds:g} s (--hang-timeout-seconds): {listed}", blamed


def _store(mesh: ParallelMesh) -> Any:
    """Return a store that all processes reach, held by the first one; `None` for a single process."""
    if mesh.mesh is None:
        return None
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    if mesh.rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        gather_objects(store.port, mesh)
        return store
    port = gather_objects(None, mesh)[0]
    return TCPStore(host, port, is_master=False)
