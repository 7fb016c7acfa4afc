"""Run the project's commands as a user does."""

import importlib
import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

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


def run_command(*args: object, cwd: Path | None = None, stdin: str = "", **more: str) -> Finished:
    """Run `asd-core pretrain ...` in this Python, and wait."""
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
    """Run `asd-core pretrain ...` inside this process: no new Python, for commands that end early."""
    module = importlib.import_module(MODULES[str(args[0])])
    out, err = io.StringIO(), io.StringIO()
    words = [str(arg) for arg in args]
    with (
        redirect_stdout(out),
        redirect_stderr(err),
        patch.object(sys, "argv", words),
        patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        status = module.run_app(module.app, words[0], words[1:])
    return Finished(status, out.getvalue(), err.getvalue())
