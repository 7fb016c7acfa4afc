"""Run one untrusted program in its own process and return the result."""

import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("child.py")


@dataclass(frozen=True)
class SandboxLimits:
    """Resource limits of a program.

    Attributes:
        seconds: wall-clock and processor time.
        memory_bytes: address space.
        file_bytes: size of any one file.
        output_bytes: stdout and stderr together; more ends the program.
    """

    seconds: float = 10.0
    memory_bytes: int = 2 * 1024**3
    file_bytes: int = 16 * 1024**2
    output_bytes: int = 64 * 1024


@dataclass(frozen=True)
class ProgramResult:
    """How a program ended.

    Attributes:
        passed: whether it ran to its end without an exception.
        reason: `passed`, `timed out`, `too much output`, the exception, or how it ended.
        protections: confinement besides resource limits: `user` (not root), `capabilities`,
            `landlock`, `seccomp`.
    """

    passed: bool
    reason: str
    protections: tuple[str, ...]


def run_program(program: str, limits: SandboxLimits | None = None) -> ProgramResult:
    """Run a program to its end or to a limit.

    The process has an empty environment, no stdin, no file descriptors but its output, a scratch folder that is
    deleted afterwards, resource limits, and, where the kernel has them, seccomp (no network, no processes, no signals
    to others) and Landlock (no reading outside Python's own files, no writing outside the scratch folder).

    A program passes only if it returns a secret that is written after its last line; exit status 0 alone is a failure.
    """
    limits = limits or SandboxLimits()
    scratch = Path(tempfile.mkdtemp(prefix="asd-eval-"))
    scratch.chmod(0o777)
    try:
        (scratch / "program.py").write_text(program, encoding="utf-8", errors="surrogatepass")
        return _supervise(scratch, limits)
    finally:
        _remove(scratch)


def _supervise(scratch: Path, limits: SandboxLimits) -> ProgramResult:
    secret = secrets.token_hex(16)
    verdict, verdict_out = os.pipe()
    secret_in, secret_out = os.pipe()
    os.write(secret_out, secret.encode())
    os.close(secret_out)
    command = [
        sys.executable, "-I", "-S", "-B", str(CHILD), str(scratch), str(secret_in), str(verdict_out),
        str(limits.memory_bytes), str(limits.file_bytes), str(int(limits.seconds) + 1),
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={},
        cwd=scratch,
        pass_fds=(secret_in, verdict_out),
        start_new_session=True,
    )
    os.close(secret_in)
    os.close(verdict_out)
    try:
        output, stopped = _read_output(process, limits)
    finally:
        _kill(process)
    with os.fdopen(verdict, "rb") as file:
        os.set_blocking(file.fileno(), False)
        said = file.read(4096) or b""
    lines = said.decode("utf-8", "replace").splitlines()
    protections = tuple(lines[0].split()) if lines else ()
    if stopped:
        return ProgramResult(False, stopped, protections)
    if secret in lines[1:]:
        return ProgramResult(True, "passed", protections)
    return ProgramResult(False, _reason(process.returncode, output), protections)


def _read_output(process: "subprocess.Popen[bytes]", limits: SandboxLimits) -> tuple[bytes, str | None]:
    """Read until the program ends or exceeds a limit."""
    assert process.stdout is not None
    deadline = time.monotonic() + limits.seconds
    output = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return output, "timed out"
            if selector.select(min(left, 0.5)):
                part = os.read(process.stdout.fileno(), 65536)
                if not part:
                    break
                output += part
                if len(output) > limits.output_bytes:
                    return output, "too much output"
            elif process.poll() is not None:
                break
    try:
        process.wait(max(deadline - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        return output, "timed out"
    return output, None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the program and all processes of its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _reason(status: int, output: bytes) -> str:
    if status < 0:
        return f"ended by signal {signal.Signals(-status).name}"
    lines = output.decode("utf-8", "replace").strip().splitlines()
    if status == 0:
        return "ended before its last line"
    return lines[-1][:200] if lines else f"ended with status {status}"


def _remove(folder: Path) -> None:
    """Delete a folder, even if the program removed its permissions."""
    for root, folders, _ in os.walk(folder):
        for name in folders:
            path = Path(root) / name
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
