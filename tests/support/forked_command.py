"""Ask the fork server for a process; also a program that stands in for a command in a shell.

It imports next to nothing: as a program it takes some milliseconds of each command.
"""

import contextlib
import json
import os
import signal
import socket
from collections.abc import Mapping, Sequence
from typing import NoReturn

ADDRESS = "FORK_SERVER"
"""Environment variable that names the server's socket to commands of a shell."""


class ForkedCommand:
    """A process that the server forked.

    Args:
        address: the server's socket.
        words: `-m`, a module and its arguments; or a program and its arguments.
        environment: all of it.
        folder: to work in.
        streams: descriptors for stdin, stdout and stderr.
        session: whether the process leads a session of its own.
    """

    def __init__(
        self,
        address: str,
        words: Sequence[str],
        environment: Mapping[str, str],
        folder: str,
        streams: Sequence[int],
        session: bool,
    ) -> None:
        absolute = os.path.abspath(folder)  # noqa: PTH100 - pathlib takes longer to import than all else here
        request = {"words": words, "environment": dict(environment), "folder": absolute, "session": session}
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(address)
        message = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._connection, [message], list(streams))
        if sent < len(message):
            # Not for nothing: once the whole request is there, its process may have ended, and the socket with it.
            self._connection.sendall(message[sent:])
        self._received = b""
        self.pid = self._next_number(timeout=None)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; the negative number of a signal that ended the process.

        Raises:
            TimeoutError: it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            self.returncode = self._next_number(timeout)
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit status, or None while the process runs."""
        with contextlib.suppress(TimeoutError, BlockingIOError):
            return self.wait(timeout=0)
        return None

    def _next_number(self, timeout: float | None) -> int:
        self._connection.settimeout(timeout)
        while b"\n" not in self._received:
            more = self._connection.recv(100)
            if not more:
                raise RuntimeError("the fork server ended")
            self._received += more
        line, self._received = self._received.split(b"\n", 1)
        return int(line)

    def send_signal(self, number: int) -> None:
        """Send the process a signal, if it still runs."""
        if self.returncode is None:
            os.kill(self.pid, number)


def main(python: str, *words: str) -> NoReturn:
    """Run `python *words` in this process's place; by itself, if it is neither a module nor a file."""
    module_or_file = words[1:] if words[:1] == ("-u",) else words
    if module_or_file[:1] != ("-m",) and not (module_or_file and os.path.isfile(module_or_file[0])):  # noqa: PTH113 - as above
        os.execv(python, [python, *words])
    command = ForkedCommand(
        os.environ[ADDRESS], module_or_file, os.environ, os.curdir, (0, 1, 2), session=False
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: command.send_signal(number))
    status = command.wait()
    os._exit(status if status >= 0 else 128 - status)
