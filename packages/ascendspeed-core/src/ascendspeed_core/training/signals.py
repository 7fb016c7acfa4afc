"""Stop between two steps when SIGTERM or Ctrl-C asks for it."""

import signal
import threading
from types import FrameType

import torch

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


class StopSignal:
    """Remembers SIGTERM or Ctrl-C instead of dying from it; a second one ends the process at once.

    Args:
        mesh: of this rank; any rank may get the signal, at any time.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh, self._asked_by = mesh, 0
        self._handles = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopSignal":
        if self._handles:
            self._before = [signal.signal(number, self._remember) for number in SIGNALS]
        return self

    def __exit__(self, *error: object) -> None:
        if self._handles:
            for number, before in zip(SIGNALS, self._before, strict=True):
                signal.signal(number, before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked_by = number
        for one in SIGNALS:
            signal.signal(one, signal.SIG_DFL)
        if self._mesh.rank == 0:
            log(f"{NAMES[signal.Signals(number)]}: saving after this step; a second one ends the run at once")

    def requested(self) -> int:
        """Return the signal that asked any rank to stop, the same on all ranks; 0 for none."""
        asked = [float(self._asked_by == number) for number in SIGNALS]
        counts = self._mesh.sum_over_all(torch.tensor(asked, device=self._mesh.device.torch))
        return next(
            (number for number, count in zip(SIGNALS, counts.cpu().tolist(), strict=True) if count), 0
        )
