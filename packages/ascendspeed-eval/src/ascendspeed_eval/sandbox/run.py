"""Run one untrusted program against its tests, in processes of their own."""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ascendspeed_eval.errors import EvaluationError

PACKAGES = Path(__file__).parents[2]
START = "import sys; sys.path.append(sys.argv[1]); from ascendspeed_eval.sandbox.stage import main; main()"
SECONDS_TO_START = 60.0
SECONDS_TO_END = 5.0
MAX_VERDICT_BYTES = 65536
TRIES = 3
SECONDS_BETWEEN_TRIES = 0.5
TIMED_OUT = "timed out"


class SandboxLevel(StrEnum):
    """What stands around a program; docs/sandbox.md says what each promises."""

    NAMESPACES = "namespaces"
    LANDLOCK = "landlock"
    WEAK = "weak"

    @property
    def description(self) -> str:
        """What it is, in a few words."""
        return {
            "namespaces": "namespaces of their own",
            "landlock": "seccomp and Landlock, without namespaces",
            "weak": "a weak sandbox: with limits, and with what else this machine has",
        }[self.value]


REQUIRED: Mapping[SandboxLevel, frozenset[str]] = MappingProxyType(
    {
        SandboxLevel.NAMESPACES: frozenset(
            {"pid namespace", "mount namespace", "network namespace", "capabilities", "seccomp"}
        ),
        SandboxLevel.LANDLOCK: frozenset({"landlock", "capabilities", "seccomp"}),
        SandboxLevel.WEAK: frozenset(),
    }
)
"""The protections without which a level is not reached."""


class SandboxError(EvaluationError):
    """The sandbox itself could not be built; this says nothing about a program."""


@dataclass(frozen=True)
class SandboxLimits:
    """Resource limits of a program.

    Attributes:
        seconds: wall-clock and processor time.
        memory_bytes: address space.
        file_bytes: size of any one file.
        scratch_bytes: size of all files together.
        scratch_files: number of files and folders.
    """

    seconds: float = 10.0
    memory_bytes: int = 2 * 1024**3
    file_bytes: int = 16 * 1024**2
    scratch_bytes: int = 32 * 1024**2
    scratch_files: int = 256


@dataclass(frozen=True)
class ProgramUnderTest:
    """A program and its tests.

    Attributes:
        program: Python code with the answer; it never sees the tests.
        prompt: Python code, complete but for the body of its last function; the tests may use its names.
        tests: Python code that defines `check`, which takes the function.
        entry_point: name of the function.
    """

    program: str
    prompt: str
    tests: str
    entry_point: str


@dataclass(frozen=True)
class ProgramResult:
    """How the tests of a program ended.

    Attributes:
        passed: whether the tests ran to their end without an exception.
        reason: `passed`, `timed out`, the exception, or how the program ended.
        protections: what stood around it, besides limits.
        own_operations: how often a test was decided by an operator of the program's own classes, such as `__eq__`.
    """

    passed: bool
    reason: str
    protections: tuple[str, ...]
    own_operations: int = 0


class Sandbox:
    """Runs untrusted programs, one after another, each in processes of its own.

    Args:
        level: what must stand around each program; `open_sandbox` finds the best that this machine has.
        limits: of each program.
    """

    def __init__(self, level: SandboxLevel, limits: SandboxLimits | None = None) -> None:
        self.level, self.limits = level, limits or SandboxLimits()
        self._lock = threading.Lock()
        self._stage: _Stage | None = None
        self._has_worked = False

    def run(self, tested: ProgramUnderTest) -> ProgramResult:
        """Run the tests of a program to their end or to a limit.

        Raises:
            SandboxError: the sandbox could not be built; if it ever was, in three tries.
        """
        with self._lock:
            for left in reversed(range(TRIES)):
                try:
                    result = self._run_once(tested)
                except SandboxError:
                    self.close()
                    if not (left and self._has_worked):
                        raise
                    time.sleep(SECONDS_BETWEEN_TRIES)
                else:
                    self._has_worked = True
                    return result
        raise AssertionError("not reached")

    def close(self) -> None:
        """End the processes of the sandbox; the next program starts them again."""
        if self._stage is not None:
            self._stage.close()
        self._stage = None

    def _run_once(self, tested: ProgramUnderTest) -> ProgramResult:
        if self._stage is None or not self._stage.is_usable():
            self.close()
            self._stage = _Stage(self.level)
        verdict, verdict_out = os.pipe()
        stop_in, stop = os.pipe()
        messages = _Messages(verdict)
        try:
            with tempfile.TemporaryFile() as job:
                job.write(json.dumps(asdict(tested)).encode("ascii"))
                job.flush()
                self._stage.send(self.limits, (job.fileno(), verdict_out, stop_in))
            os.close(verdict_out)
            os.close(stop_in)
            verdict_out = stop_in = -1
            return _listen(messages, self.level, self.limits)
        finally:
            for descriptor in (verdict_out, stop_in, stop):
                if descriptor >= 0:
                    os.close(descriptor)
            if not messages.drain(SECONDS_TO_END):
                self.close()


class _Stage:
    """The process that starts the processes of programs.

    Args:
        level: what must stand around each program.
    """

    def __init__(self, level: SandboxLevel) -> None:
        self._owner = os.getpid()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", START, str(PACKAGES), level.value],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
            except OSError as error:
                self._control.close()
                raise SandboxError(f"the sandbox did not start: {error}") from None
        self.close = weakref.finalize(self, _end, process, self._control)
        self._control.settimeout(SECONDS_TO_START)
        try:
            greeting = json.loads(self._control.recv(MAX_VERDICT_BYTES) or b"{}")
        except OSError as error:
            self.close()
            raise SandboxError(f"the sandbox did not start: {error}") from None
        if "held" not in greeting:
            self.close()
            why = greeting.get("error", f"its process ended with status {process.returncode}")
            raise SandboxError(f"the sandbox did not start: {why}")

    def is_usable(self) -> bool:
        """Return whether it may be asked: by the process that made it, until it is closed."""
        return self.close.alive and self._owner == os.getpid()

    def send(self, limits: SandboxLimits, descriptors: Sequence[int]) -> None:
        """Ask for a program to be run."""
        settings = {**asdict(limits), "seconds": int(limits.seconds) + 1}
        try:
            socket.send_fds(self._control, [json.dumps(settings).encode()], descriptors)
        except OSError as error:
            raise SandboxError(f"the sandbox of a program did not start: {error}") from None


def _end(process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
    """Let the stage end, or kill it; programs end with it."""
    control.close()
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Messages:
    """Lines of JSON that come through the pipe of the verdict.

    Args:
        descriptor: of the pipe.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._held, self._size = descriptor, b"", 0
        self._selector = selectors.DefaultSelector()
        self._selector.register(descriptor, selectors.EVENT_READ)

    def next(self, deadline: float) -> Mapping[str, Any] | None:
        """Return the next message, or `None` at the end.

        Raises:
            TimeoutError: none came until `deadline`, of the monotonic clock.
        """
        while b"\n" not in self._held:
            if not self._selector.select(max(deadline - time.monotonic(), 0)):
                raise TimeoutError
            part = os.read(self._descriptor, 65536)
            self._size += len(part)
            if not part or self._size > MAX_VERDICT_BYTES:
                return None
            self._held += part
        line, _, self._held = self._held.partition(b"\n")
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def drain(self, seconds: float) -> bool:
        """Close the pipe after its end has come; return whether it came in time."""
        self._size, deadline = 0, time.monotonic() + seconds
        try:
            while self.next(deadline) is not None:
                pass
            return True
        except TimeoutError:
            return False
        finally:
            self._selector.close()
            os.close(self._descriptor)


def _listen(messages: _Messages, level: SandboxLevel, limits: SandboxLimits) -> ProgramResult:
    """Wait until the walls stand, then for the verdict."""
    try:
        walls = messages.next(time.monotonic() + SECONDS_TO_START)
    except TimeoutError:
        raise SandboxError(
            f"the sandbox of a program did not start within {SECONDS_TO_START:.0f} s"
        ) from None
    if walls is None or "protections" not in walls:
        why = "it ended without a word" if walls is None else walls.get("error", walls.get("ended"))
        raise SandboxError(f"the sandbox of a program did not start: {why}")
    protections = tuple(walls["protections"])
    if missing := sorted(REQUIRED[level] - set(protections)):
        raise SandboxError(f"the sandbox of a program lacks {', '.join(missing)}")
    try:
        said = messages.next(time.monotonic() + limits.seconds) or {}
    except TimeoutError:
        return ProgramResult(False, TIMED_OUT, protections)
    if "ended" in said:
        return ProgramResult(False, f"the tests {said['ended']}", protections)
    operations = said.get("own_operations")
    if not isinstance(said.get("reason"), str) or type(operations) is not int:
        return ProgramResult(False, "the tests gave no verdict", protections)
    return ProgramResult(said.get("passed") is True, said["reason"], protections, operations)
