"""Stop between two steps when SIGTERM asks for it."""

import signal
import threading
from types import FrameType

import torch

from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError


class StoppedError(AscendSpeedError):
    """A signal ended the run after a checkpoint; the exit status is that of a process that the signal ended."""

    exit_code = 128 + signal.SIGTERM


class StopSignal:
    """Remembers SIGTERM instead of dying from it; a second one ends the process at once.

    Args:
        mesh: of this rank; any rank may get the signal, at any time.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        self._mesh, self._is_stop_requested = mesh, False
        self._handles = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "StopSignal":
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handles:
            signal.signal(signal.SIGTERM, self._before)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._is_stop_requested = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log("SIGTERM: saving after this step; a second one ends the run at once")

    def is_stop_requested(self) -> bool:
        """Return whether any rank was asked to stop, the same on all ranks."""
        asked = torch.tensor(float(self._is_stop_requested), device=self._mesh.device.torch)
        return bool(self._mesh.sum_over_all(asked))
