"""End a run that stands still, and say which process is to blame and where it stands.

When one process hangs, all others soon wait for it in a collective, for ever or until a time-out whose message names
none of them. Here a thread of each process notices that its process makes no progress, and then all tell each other
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
"""How long answers of the other processes are awaited."""

POLL_SECONDS = 0.01
"""Between two looks for them."""

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
    """Where a process stands.

    Attributes:
        rank: the process.
        iteration: step that it is in.
        place: the last layer that it began, or what it does.
        beats: layers that it has begun in all.
        innermost: `file:line in function` of its main thread.
        waits: whether that function waits for other processes.
        stack: innermost frames of its main thread, as lines.
    """

    rank: int
    iteration: int
    place: str
    beats: int
    innermost: str
    waits: bool
    stack: tuple[str, ...]


class Watchdog:
    """Watches this process, with those of the others; all make it and start it alike.

    Args:
        mesh: the processes.
        timeout_seconds: without progress, until the run is ended.
        model: its layers are the progress.
    """

    def __init__(self, mesh: ParallelMesh, timeout_seconds: float, model: Transformer) -> None:
        self._mesh, self._timeout = mesh, timeout_seconds
        self._interval = min(max(timeout_seconds / 10, 0.1), 5.0)
        self._main = threading.get_ident()
        self._iteration, self._place, self._beats = 0, "", 0
        self._last: float | None = None
        self._done = threading.Event()
        self._store = _store(mesh)
        self._processes: list[tuple[str, int]] = gather_objects((socket.gethostname(), os.getpid()), mesh)
        self._hooks = [
            layer.register_forward_pre_hook(self._beat_at(f"layers.{number}"))
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
        self._beat(what)
        try:
            yield
        finally:
            self._last = None

    def _beat_at(self, place: str) -> Any:
        return lambda *_: self._beat(place)

    def _beat(self, place: str) -> None:
        self._place, self._beats = place, self._beats + 1
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            last = self._last
            is_idle = last is not None and time.monotonic() - last > self._timeout
            try:
                if is_idle and self._store is not None:
                    self._store.set("alarm", str(self._mesh.rank))
                if is_idle or (self._store is not None and self._store.check(["alarm"])):
                    self._end(self._ask_all())
            except DistError as error:
                if not self._done.wait(self._interval):
                    log(
                        f"watchdog of rank {self._mesh.rank}: process 0 is gone ({error}); nothing is watched"
                    )
                return

    def _ask_all(self) -> list[RankStatus]:
        """Tell where this process stands, and return what all tell that answer in time."""
        mine = self._standing()
        if self._store is None:
            return [mine]
        self._store.set(f"standing/{mine.rank}", json.dumps(asdict(mine)))
        keys = [f"standing/{rank}" for rank in range(self._mesh.layout.world_size)]
        self._wait_for(keys, max(GRACE_SECONDS, 2 * self._interval))
        answers = [json.loads(self._store.get(key)) for key in keys if self._store.check([key])]
        return [RankStatus(**answer) for answer in answers]

    def _leave_together(self, answers: list[RankStatus]) -> None:
        """Wait until all that answered have read the answers: who leaves first breaks the others' connections."""
        if self._store is None:
            return
        # The store goes with process 0, which leaves when all are ready.
        with suppress(DistError):
            self._store.set(f"leaves/{self._mesh.rank}", "")
            self._wait_for([f"leaves/{answer.rank}" for answer in answers], GRACE_SECONDS)

    def _wait_for(self, keys: list[str], seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._store.check(keys) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)

    def _standing(self) -> RankStatus:
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        inner = frames[-1]
        return RankStatus(
            self._mesh.rank,
            self._iteration,
            self._place,
            self._beats,
            f"{inner.filename}:{inner.lineno} in {inner.name}",
            inner.name == DEVICE_WAITING or any(part in inner.filename for part in WAITING),
            tuple(line.rstrip() for line in traceback.format_list(frames[-FRAMES:])),
        )

    def _end(self, answers: list[RankStatus]) -> None:
        world = self._mesh.layout.world_size
        message, blamed = verdict(answers, world, self._timeout)
        is_speaker = self._mesh.rank == min(answer.rank for answer in answers)
        if is_speaker:
            for answer in blamed:
                log(f"stack of rank {answer.rank}, innermost call last:\n" + "\n".join(answer.stack))
        self._leave_together(answers)
        if is_speaker:
            self._kill_silent(set(range(world)) - {answer.rank for answer in answers})
        end_process(AscendSpeedError(message))

    def _kill_silent(self, ranks: set[int]) -> None:
        """End processes of this machine that do not answer: they would not hear a gentler signal either.

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
    answers: Sequence[RankStatus], world_size: int, timeout_seconds: float
) -> tuple[str, list[RankStatus]]:
    """Return the message that names who hangs, and the answers of those.

    Args:
        answers: of the processes that answered.
        world_size: of all processes.
        timeout_seconds: how long there was no progress.
    """
    silent = sorted(set(range(world_size)) - {answer.rank for answer in answers})
    busy = [answer for answer in answers if not answer.waits]
    waiting = [answer for answer in answers if answer.waits]
    parts = [f"rank {rank} does not answer: it is stopped, or stuck outside Python" for rank in silent]
    parts += [f"rank {a.rank} stands in iteration {a.iteration}, {a.place}: {a.innermost}" for a in busy]
    blamed = busy
    if not parts:
        least = min(answer.beats for answer in answers)
        blamed = [answer for answer in answers if answer.beats == least]
        parts = ["all processes wait for each other or for their device; furthest behind:"]
        parts += [f"rank {a.rank} in iteration {a.iteration}, {a.place}: {a.innermost}" for a in blamed]
    elif waiting:
        ranks = ", ".join(str(answer.rank) for answer in waiting)
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
