"""Build the sandbox of a program: a process for the answer, one for the tests, and walls around each.

    the evaluation ── stage ── supervisor ── tests ── answer

The stage starts from nothing (an empty environment, no open files but a socket to the evaluation), enters namespaces,
and forks a supervisor for each program. This starts the process of the tests, which starts the process of the answer
before it has read a line of the tests. Only the tests hold the pipe of the verdict; the answer holds two pipes to the
tests, and nothing else. When the tests end, or the evaluation closes its end of a pipe, everything of the program ends.

Runs in the processes of the sandbox, so it imports only the standard library.
"""

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ascendspeed_eval.sandbox.answer import serve_tests
from ascendspeed_eval.sandbox.confine import (
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    Confinement,
    Limits,
    confine,
    python_folders,
    threads_of_user,
)
from ascendspeed_eval.sandbox.namespaces import (
    SCRATCH,
    NamespaceError,
    ScratchLimits,
    enter_namespaces,
    enter_program_namespaces,
)
from ascendspeed_eval.sandbox.run_tests import describe, run_tests
from ascendspeed_eval.sandbox.values import Frames

PR_SET_CHILD_SUBREAPER = 36
MAX_THREADS = 64
FIRST_USER, USERS = 1_000_000_000, 1_000_000
FROM_TESTS, TO_TESTS = 3, 4
SECONDS_TO_END = 1.0


class Settings(NamedTuple):
    """What the evaluation asks for.

    Attributes:
        memory_bytes: address space of each process.
        file_bytes: size of any one file.
        seconds: processor time of each process.
        scratch_bytes: size of all files together.
        scratch_files: number of files and folders.
    """

    memory_bytes: int
    file_bytes: int
    seconds: int
    scratch_bytes: int
    scratch_files: int


class Descriptors(NamedTuple):
    """Open files of one program.

    Attributes:
        job: the program and its tests.
        verdict: the pipe to the evaluation.
        stop: a pipe that ends when the evaluation wants everything to end.
    """

    job: int
    verdict: int
    stop: int


class Ground(NamedTuple):
    """What the stage has, for all programs.

    Attributes:
        libc: the C library.
        readable: folders of Python.
        held: protections that hold already.
        in_new_root: the root folder is new.
    """

    libc: ctypes.CDLL
    readable: tuple[str, ...]
    held: list[str]
    in_new_root: bool


def main() -> None:
    """Serve the evaluation at the other end of standard input until it closes it."""
    sys.path.remove(sys.argv[1])
    control = socket.socket(fileno=os.dup(0))
    _no_streams()
    try:
        ground = _prepare(in_new_root=sys.argv[2] == "namespaces")
    except BaseException as error:  # noqa: BLE001 - the evaluation names it
        why = str(error) if isinstance(error, NamespaceError) else describe(error)
        control.send(json.dumps({"error": why}).encode())
        os._exit(1)
    control.send(json.dumps({"held": ground.held}).encode())
    gc.freeze()
    stage = os.getpid()
    while True:
        request, descriptors, _, _ = socket.recv_fds(control, 65536, 3)
        if not request:
            os._exit(0)
        supervisor = os.fork()
        if supervisor == 0:
            control.close()
            _supervise(ground, Settings(**json.loads(request)), Descriptors(*descriptors), stage)
        for one in descriptors:
            os.close(one)
        os.waitpid(supervisor, 0)


def _prepare(*, in_new_root: bool) -> Ground:
    libc = ctypes.CDLL(None, use_errno=True)
    os.umask(0o022)
    readable = tuple(python_folders())
    held = enter_namespaces(libc, readable) if in_new_root else []
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    return Ground(libc, readable, held, in_new_root)


def _supervise(ground: Ground, settings: Settings, files: Descriptors, stage: int) -> NoReturn:
    """Run one program, and leave no process behind."""
    try:
        os.setsid()
        ground.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != stage:
            os._exit(1)
        ground.libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        confined = _walls(ground, settings)
        alive, alive_in_tests = os.pipe()
        tests = os.fork()
        if tests == 0:
            _be_tests(files, confined)
        os.close(alive_in_tests)
        select.select([alive, files.stop], [], [])
        os.kill(tests, signal.SIGKILL)  # It is dead already, or must be.
        _, status = os.waitpid(tests, 0)
        _say(files, {"ended": how_ended(status)})
        _end_children()
    except BaseException as error:  # noqa: BLE001 - the evaluation names it
        _say(files, {"error": describe(error)})
    os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _end_children() -> None:
    """Kill and reap what the tests left to this process: the answer, where its namespace did not end it already."""
    own = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    with contextlib.suppress(ChildProcessError):
        while True:
            with contextlib.suppress(OSError):  # In a new root folder there is no /proc, and no child either.
                for number in own.read_text().split():
                    os.kill(int(number), signal.SIGKILL)
            os.wait()


def _walls(ground: Ground, settings: Settings) -> Callable[..., list[str]]:
    """Build what stands around both processes; return a function that confines the process that calls it."""
    held, threads = list(ground.held), MAX_THREADS
    if ground.in_new_root:
        limits = ScratchLimits(settings.scratch_bytes, settings.scratch_files)
        held += enter_program_namespaces(ground.libc, limits)
    elif os.geteuid() != 0:
        threads += threads_of_user(os.geteuid())
    limits_each = Limits(settings.memory_bytes, settings.file_bytes, settings.seconds, threads)
    first_user = FIRST_USER + os.getpid() % USERS * 2
    writable = SCRATCH if ground.in_new_root else None

    def confined(number: int, *, may_wait: bool) -> list[str]:
        user = first_user + number
        left = Confinement(limits_each, user, ground.readable, writable, ground.in_new_root, may_wait)
        return sorted({*held, *confine(ground.libc, left)})

    return confined


def _be_tests(files: Descriptors, confined: Callable[..., list[str]]) -> NoReturn:
    """Start the answer, then run the tests."""
    try:
        os.close(files.stop)
        from_tests, to_answer = os.pipe()
        from_answer, to_tests = os.pipe()
        answer = os.fork()
        if answer == 0:
            _be_answer(from_tests, to_tests, confined)
        os.close(from_tests)
        os.close(to_tests)
        frames = Frames(from_answer, to_answer)
        job = json.loads(_read_all(files.job))
        own = confined(0, may_wait=True)
        theirs = frames.receive()
        if own != theirs:
            raise RuntimeError(f"tests are held by {own}, the answer by {theirs}")
        _say(files, {"protections": own})
        verdict = run_tests(frames, job)
        said = verdict._asdict()
        if verdict.answer_ended:
            said["reason"] = f"the program {_wait_for(answer)}"
        _say(files, said)
    except BaseException as error:  # noqa: BLE001 - the evaluation names it
        _say(files, {"error": describe(error)})
    os._exit(0)


def _be_answer(source: int, sink: int, confined: Callable[..., list[str]]) -> NoReturn:
    """Keep two pipes and nothing else, then serve the tests."""
    try:
        # Out of the way first: the numbers that they get may be theirs already.
        source, sink = os.dup(source), os.dup(sink)
        high = max(source, sink, 16)
        os.dup2(source, high + 1)
        os.dup2(sink, high + 2)
        os.dup2(high + 1, FROM_TESTS)
        os.dup2(high + 2, TO_TESTS)
        os.closerange(TO_TESTS + 1, os.sysconf("SC_OPEN_MAX"))
        serve_tests(FROM_TESTS, TO_TESTS, confined(1, may_wait=False))
    finally:
        os._exit(0)


def _no_streams() -> None:
    """Point the standard streams to nothing; what a program prints is not kept."""
    nothing = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    os.close(nothing)


def _read_all(descriptor: int) -> bytes:
    os.lseek(descriptor, 0, os.SEEK_SET)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _wait_for(process: int) -> str:
    """Return how a process ended that has closed its pipe."""
    deadline = time.monotonic() + SECONDS_TO_END
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return how_ended(status)
        time.sleep(0.002)
    return "closed its pipe"


def how_ended(status: int) -> str:
    """Describe a status of waitpid."""
    if not os.WIFSIGNALED(status):
        return f"ended with status {os.waitstatus_to_exitcode(status)}"
    number = os.WTERMSIG(status)
    try:
        return f"ended by signal {signal.Signals(number).name}"
    except ValueError:  # Signals for programs' own use have no names.
        return f"ended by signal {number}"


def _say(files: Descriptors, message: dict[str, Any]) -> None:
    os.write(files.verdict, json.dumps(message).encode("ascii") + b"\n")
