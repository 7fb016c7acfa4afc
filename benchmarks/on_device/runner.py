"""Run items in a process that may die or hang: a fault of the device spoils everything that follows in its process."""

import gc
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from on_device.plan import Item, Outcome

LAST_LINES = 12
"""Of a traceback that are kept."""

START_SECONDS = 120.0
"""A process that has not said what its device is after this long is given up."""


class Worker:
    """A process that runs items on a device.

    Args:
        wanted: device, see `choose_device`.
        options: of the `Setting`.
    """

    def __init__(self, wanted: str, options: dict[str, bool]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there, wanted, options), daemon=True)
        self._process.start()
        there.close()
        said = self._answer(START_SECONDS)
        if not isinstance(said, dict):
            self.stop()
            raise SystemExit(f"no device: {said}")
        self.about: dict[str, Any] = said

    def run(self, item: Item, seconds: float) -> Outcome:
        """Run one item for at most some seconds."""
        started = time.perf_counter()
        self._connection.send(item)
        answer = self._answer(seconds)
        if isinstance(answer, Outcome):
            return answer
        return Outcome("failed", time.perf_counter() - started, {}, str(answer))

    @property
    def is_alive(self) -> bool:
        """Whether it can run more."""
        return self._process.is_alive() and not self._connection.closed

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()
        self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _answer(self, seconds: float) -> Any:
        """Return what comes next, or why nothing does; then the process is of no more use."""
        try:
            if self._connection.poll(seconds):
                return self._connection.recv()
            reason = f"no answer after {seconds:.0f} s"
        except (EOFError, OSError):
            self._process.join(5)
            reason = f"its process ended with status {self._process.exitcode}"
        self.stop()
        return reason


def serve(connection: Connection, wanted: str, options: dict[str, bool]) -> None:
    """Say what the device is, then run each item that comes."""
    from ascendspeed_core.device import choose_device
    from on_device.setting import Setting

    try:
        setting = Setting(choose_device(wanted, quiet=True), **options)
    except Exception as error:  # noqa: BLE001 - whoever started this process prints it
        connection.send(str(error))
        return
    connection.send(about(setting))
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        outcome = attempt(item, setting)
        connection.send(outcome)
        try:
            setting.free()
        except Exception:  # noqa: BLE001 - the context is lost, a new process gets another one
            return


def attempt(item: Item, setting: Any) -> Outcome:
    """Run one item, whatever comes of it."""
    from on_device.setting import LeftOut

    started = time.perf_counter()
    try:
        figures = item.run(setting)
        setting.device.synchronize()
        return Outcome("passed", time.perf_counter() - started, figures)
    except LeftOut as reason:
        return Outcome("left out", time.perf_counter() - started, {}, str(reason))
    except Exception as error:  # noqa: BLE001 - it is named, and the rest goes on
        lines = traceback.format_exc().splitlines()[-LAST_LINES:]
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome("failed", time.perf_counter() - started, {}, text, tuple(lines))


def about(setting: Any) -> dict[str, Any]:
    """Return what the figures depend on: device, versions."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    memory = setting.device.memory_bytes()
    return {
        "device": setting.device.name,
        "kind": setting.device.kind,
        "memory GiB": round(memory / 2**30, 1) if memory else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed(name) for name in ("triton", "transformers", "liger-kernel", "torch_npu")},
    }


def run_all(
    chosen: Sequence[Item],
    wanted: str,
    minutes: float,
    options: dict[str, bool],
    tell: Callable[[Item, Outcome], None],
) -> tuple[dict[str, Any], list[tuple[Item, Outcome]]]:
    """Run items in order within some minutes.

    Args:
        chosen: what to run.
        wanted: device.
        minutes: for all of it; what would not fit any more is left out, and what takes too long is stopped.
        options: of the `Setting`.
        tell: is told of each outcome.

    Returns:
        What the device is, and the outcome of every item.
    """
    end = time.monotonic() + 60 * minutes
    worker = Worker(wanted, options)
    about_device, done = worker.about, []
    for item in chosen:
        left = end - time.monotonic()
        expected = 1.0 if about_device["kind"] == "cpu" else item.seconds
        if left < expected:
            outcome = Outcome(
                "left out", 0.0, {}, f"{max(left, 0):.0f} s were left, it takes about {expected:.0f}"
            )
        else:
            if not worker.is_alive:
                worker.stop()
                worker = Worker(wanted, options)
            outcome = worker.run(item, min(left, 60 + 3 * item.seconds))
            if outcome.status == "failed":
                # What it left in the device's memory would count in the next one.
                worker.stop()
        done.append((item, outcome))
        tell(item, outcome)
    worker.stop()
    gc.collect()
    sys.stdout.flush()
    return about_device, done
