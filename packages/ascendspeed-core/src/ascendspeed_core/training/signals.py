"""Stop between two steps when SIGTERM or Ctrl-C asks for it."""

import os
import signal
import threading
import time
from collections.abc import Callable

import torch

from ascendspeed_core.launch import end_process
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError


class StoppedError(AscendSpeedError):
    """A signal ended the run after a checkpoint; the exit status is that of a process that the signal ended.

    Args:
        message: what is kept and how to go on.
        number: of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


SIGNALS = (signal.SIGTERM, signal.SIGINT)
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
ENDED_AT_ONCE_BY: dict[int, str] = {signal.SIGTERM: "Ctrl-C", signal.SIGINT: "a second one"}
SECONDS_UNTIL_ALL_ENDED = 5.0
"""For a launcher to send all ranks the signal that it has sent to one."""


class StopSignal:
    """Remembers SIGTERM or Ctrl-C instead of dying from it; a second one ends the process at once.

    But a second SIGTERM after a first changes nothing: a scheduler may send it to the launcher and to the ranks, and
    the launcher passes it on.

    A thread reads the signals from a pipe that the interpreter writes each into as it arrives. So the second one is
    heard too while the main thread waits for another rank, where Python runs no handlers.

    Args:
        mesh: of this rank; any rank may get the signal, at any time.
        kept: called at the second signal; returns what is kept and how to go on.
    """

    def __init__(self, mesh: ParallelMesh, kept: Callable[[], str]) -> None:
        self._mesh, self._kept, self._asked_by = mesh, kept, 0
        self._handles = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopSignal":
        if self._handles:
            self._arriving, self._arrived = os.pipe()
            os.set_blocking(self._arrived, False)
            self._pipe_before = signal.set_wakeup_fd(self._arrived, warn_on_full_buffer=False)
            # Python writes only signals that have a handler.
            self._before = [signal.signal(number, lambda *_: None) for number in SIGNALS]
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._handles:
            return
        if self._asked_by and kind is not None and not issubclass(kind, AscendSpeedError):
            # Most likely another rank ended first by the second signal, which is on its way to this one.
            time.sleep(SECONDS_UNTIL_ALL_ENDED)
        for number, before in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, before)
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._arrived)
        self._thread.join()
        os.close(self._arriving)

    def _listen(self) -> None:
        while arrived := os.read(self._arriving, 1):
            number = arrived[0]
            if number not in SIGNALS:
                continue
            name = NAMES[signal.Signals(number)]
            if self._asked_by == number == signal.SIGTERM:
                continue
            if self._asked_by:
                end_process(StoppedError(f"ended at once by {name}; {self._kept()}", number))
            self._asked_by = number
            if self._mesh.rank == 0:
                log(f"{name}: saving after this step; {ENDED_AT_ONCE_BY[number]} ends the run at once")

    def requested(self) -> int:
        """Return the signal that asked any rank to stop, the same on all ranks; 0 for none."""
        asked = [float(self._asked_by == number) for number in SIGNALS]
        counts = self._mesh.sum_over_all(torch.tensor(asked, device=self._mesh.device.torch))
        return next(
            (number for number, count in zip(SIGNALS, counts.cpu().tolist(), strict=True) if count), 0
        )
