"""Run the project's commands as a user does."""

import atexit
import codecs
import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import psutil

from support.forked_command import ADDRESS, ForkedCommand

MODULES = {f"asd-{name}": f"ascendspeed_{name}.cli" for name in ("core", "data", "ckpt", "infer", "eval")}


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def complaint(self) -> str:
        """The last line of stderr, where an error stands."""
        lines = self.stderr.strip().splitlines()
        return lines[-1] if lines else ""


def environment(**more: str) -> dict[str, str]:
    """Return an environment for commands: one thread per process, nothing of a launcher or of commands before."""
    launcher = (
        "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ASCENDSPEED_LAUNCHED",
        "TORCH_DEVICE_BACKEND_AUTOLOAD",
    )  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if name not in launcher}
    return {**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


class RunningCommand(ForkedCommand):
    """A command that the fork server started, in a session of its own, and what it has printed so far.

    Args:
        args: `asd-core`, `pretrain` and so on; `-m`, a module and its arguments; or a program and its arguments.
        cwd: its folder.
        stdin: what it reads.
        more: environment variables beside those of `environment`.
    """

    def __init__(self, *args: object, cwd: Path | None = None, stdin: str = "", **more: str) -> None:
        first, *rest = [str(arg) for arg in args]
        words = ["-m", MODULES[first], *rest] if first in MODULES else [first, *rest]
        self._printed = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115 - read until the end
        with tempfile.TemporaryFile("w+") as given:
            given.write(stdin)
            given.seek(0)
            streams = [stream.fileno() for stream in (given, *self._printed)]
            variables = environment(**more, **{ADDRESS: fork_server()})
            super().__init__(
                variables[ADDRESS], words, variables, str(cwd or os.curdir), streams, session=True
            )

    @property
    def stdout(self) -> str:
        return self._text(0)

    @property
    def stderr(self) -> str:
        return self._text(1)

    def _text(self, number: int) -> str:
        # Read at a position of its own: the process goes on writing at the file's.
        file = self._printed[number].fileno()
        printed = os.pread(file, os.fstat(file).st_size, 0)
        # A command that still writes, or whose disk is full, may have written half a character.
        return codecs.getincrementaldecoder("utf-8")().decode(printed)

    def finish(self, timeout: float = 300) -> Finished:
        """Wait; a command that takes longer is killed with all of its session.

        Raises:
            TimeoutError: it took longer.
        """
        try:
            return Finished(self.wait(timeout), self.stdout, self.stderr)
        except TimeoutError:
            self.kill_session()
            raise TimeoutError(f"still running after {timeout:g} s:\n{self.stderr}") from None

    def send_group_signal(self, number: int) -> None:
        """Send the process and all of its group a signal, as a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill_session(self) -> None:
        """Kill the process and its session; ranks lead sessions of their own, and must end with it. Wait for all."""
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            started = psutil.Process(self.pid).children(recursive=True)
            os.killpg(self.pid, signal.SIGKILL)
            _, alive = psutil.wait_procs(started, timeout=60)
            assert not alive, f"outlived their launcher: {alive}"
        self.wait()


@cache
def fork_server() -> str:
    """Start this process's fork server, once; return its socket.

    Beside it are programs that have the server run `asd-core`, `torchrun` and so on, and `python`, which its processes
    take for the Python that they start others with.
    """
    folder = Path(tempfile.mkdtemp(prefix="asd-fork-server-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = folder / "socket"
    tests = str(Path(__file__).parents[1])
    words = {name: f"'-m', {module!r}, " for name, module in MODULES.items()}
    for name, first in {**words, "torchrun": "'-m', 'torch.distributed.run', ", "python": ""}.items():
        program = folder / name
        program.write_text(
            f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {tests!r})\n"
            f"from support.forked_command import main\nmain({sys.executable!r}, {first}*sys.argv[1:])\n"
        )
        program.chmod(0o755)
    path = os.pathsep.join([tests, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    command = [sys.executable, "-m", "support.fork_server", str(address)]
    server = subprocess.Popen(command, env=environment(PYTHONPATH=path.rstrip(os.pathsep)))
    while not address.exists():
        assert server.poll() is None, "the fork server ended"
        time.sleep(0.02)
    return str(address)


def shell_variables() -> dict[str, str]:
    """Return the environment with which a shell has the fork server run `asd-core`, `torchrun` and so on."""
    address = fork_server()
    folders = [str(Path(address).parent), str(Path(sys.executable).parent), os.environ["PATH"]]
    return environment(PATH=os.pathsep.join(folders), **{ADDRESS: address})


def run_command(*args: object, cwd: Path | None = None, stdin: str = "", **more: str) -> Finished:
    """Run `asd-core pretrain ...`, and wait; in a Python of its own if what it imports is another."""
    if not any(name.startswith("PYTHON") for name in more):
        return RunningCommand(*args, cwd=cwd, stdin=stdin, **more).finish()
    done = subprocess.run(
        command_line(*args),
        cwd=cwd,
        input=stdin,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def command_line(*args: object) -> list[str]:
    """Return the arguments that start a command in this Python."""
    return [sys.executable, "-m", MODULES[str(args[0])], *map(str, args[1:])]


def call(*args: object, stdin: str = "") -> Finished:
    """Run `asd-core pretrain ...` inside this process, or as one of its own if it starts several."""
    if "--nproc-per-node" in args or "parity" in args[1:2]:
        return run_command(*args, stdin=stdin)
    module = importlib.import_module(MODULES[str(args[0])])
    out, err = io.StringIO(), io.StringIO()
    words = [str(arg) for arg in args]
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", words),
        patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        status = importlib.import_module(module.run_and_exit.__module__).run_app(
            module.app, words[0], words[1:]
        )
    return Finished(status, out.getvalue(), err.getvalue())
