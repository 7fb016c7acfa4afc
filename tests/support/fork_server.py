"""A process that has imported what commands import and forks itself for each: they start in milliseconds.

Importing torch, its launcher and megatron-core takes each new Python several seconds of processor time, and tests
start some hundred commands with several ranks each. What is started here runs as it would in a Python of its own: with
its own arguments, environment, folder, streams and session, and its ranks are children of the command, as a launcher
has them. Only what is imported before it begins differs, and that the ranks share a seed of hashes. Tests of imports,
and of a made-up device that PYTHONPATH leads to, start Pythons of their own.

A request is one message on a socket: a line of JSON, and three descriptors for stdin, stdout and stderr. The answers
are two lines: the number of the process, and later its exit status.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.forked_command import ADDRESS

PACKAGES = tuple(f"ascendspeed_{name}" for name in ("core", "data", "ckpt", "infer", "eval"))
ALSO = ("matplotlib.pyplot", "torch._dynamo", "torch.distributed.run", "transformers.tokenization_utils_base")
MEGATRON = (
    "optimizer_param_scheduler",
    "datasets.gpt_dataset",
    "pipeline_parallel",
)


def main(address: str) -> None:
    """Import, listen and fork, until the process that started this one ends."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import_all()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{address}.new")
    listening.listen()
    # There only when somebody listens.
    Path(f"{address}.new").rename(address)
    gc.collect()
    gc.freeze()
    with selectors.DefaultSelector() as waiting:
        waiting.register(listening, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is listening:
                    _fork(listening, waiting)
                else:
                    _report(key, waiting)


def _import_all() -> None:
    from ascendspeed_core.device import prepare_torch
    from ascendspeed_core.megatron import megatron

    prepare_torch("cpu")
    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    for name in ALSO:
        importlib.import_module(name)
    for name in MEGATRON:
        megatron(name)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    subprocess_handler.Popen = ForkedPython  # type: ignore[misc,assignment]


def _fork(listening: socket.socket, waiting: selectors.BaseSelector) -> None:
    """Take a request, and start the process that it asks for."""
    connection, _ = listening.accept()
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(1 << 20)
    request = json.loads(message)
    process = os.fork()
    if process == 0:
        # SIGINT is ignored, as in the server, until the command begins.
        _end_with_parent()
        _run(request["words"], request["environment"], request["folder"], streams, request["session"])
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{process}\n".encode())
    waiting.register(os.pidfd_open(process), selectors.EVENT_READ, (process, connection))


def _report(key: selectors.SelectorKey, waiting: selectors.BaseSelector) -> None:
    """Tell whoever asked for a process that it ended."""
    process, connection = key.data
    waiting.unregister(key.fileobj)
    os.close(key.fd)
    _, status = os.waitpid(process, 0)
    # Nobody may be left to hear it.
    with contextlib.suppress(OSError), connection:
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


class ForkedPython:
    """What `subprocess.Popen` is to torch's launcher, without a new Python: this process, forked."""

    def __init__(
        self, args: Sequence[str], env: Mapping[str, str], stdout: Any, stderr: Any, start_new_session: bool
    ) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.args = args
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            streams = (0, 1 if stdout is None else stdout.fileno(), 2 if stderr is None else stderr.fileno())
            _run(
                [word for word in args[1:] if word != "-u"], env, str(Path.cwd()), streams, start_new_session
            )

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        if self.returncode is None:
            process, status = os.waitpid(self.pid, os.WNOHANG)
            if process:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit status."""
        if self.poll() is None and timeout is not None:
            import subprocess
            from time import monotonic, sleep

            end = monotonic() + timeout
            while self.poll() is None:
                if monotonic() > end:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                sleep(0.01)
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _run(
    words: Sequence[str], environment: Mapping[str, str], folder: str, streams: Sequence[int], session: bool
) -> None:
    """Become, in a forked process, what `python *words` would be there; never return.

    Args:
        words: `-m`, a module and its arguments, or a program and its arguments.
        environment: all of it.
        folder: to work in.
        streams: descriptors of stdin, stdout and stderr.
        session: whether the process leads a session of its own.
    """
    status = 1
    try:
        _leave_parent_behind(streams, session)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.executable = str(Path(environment[ADDRESS]).with_name("python"))
        status = _run_words(words, folder)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - nothing above this process may go on in it
        traceback.print_exc()
    finally:
        os._exit(status)


def _run_words(words: Sequence[str], folder: str) -> int:
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if words[0] == "-m":
            sys.argv, sys.path[0] = list(words[1:]), folder
            sys.modules.pop(words[1], None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = list(words), str(Path(words[0]).resolve().parent)
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - printed, as Python does
        traceback.print_exc()
        return 1
    return 0


def _leave_parent_behind(streams: Sequence[int], session: bool) -> None:
    """Keep nothing of the parent but its imports: not its session, descriptors, handlers or what it does at its end."""
    if session:
        os.setsid()
    for target, stream in enumerate([os.dup(stream) for stream in streams]):
        os.dup2(stream, target)
    os.closerange(3, 4096)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    for end in weakref.finalize._registry.values():  # type: ignore[attr-defined]
        end.atexit = False
    random.seed()
    sys.modules["numpy"].random.seed()


def _end_with_parent() -> None:
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
