"""C++ of this package as libraries for the processor that runs, compiled when they are first needed.

A compiler takes a second or two; what it made is kept in the user's cache, by everything that it depends on. Without a
compiler nothing is lost but time: who asks gets the reason, and computes with plain torch.
"""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "cpp"
OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
TIMEOUT = 120
"""Seconds that a compiler may take."""

logger = logging.getLogger(__name__)


class CannotCompileError(Exception):
    """There is no compiler here, or it does not take the source; the text says which."""


@cache
def compiled(source: str, *options: str) -> ctypes.CDLL:
    """Return a source of `cpp/` as a library of its own.

    Args:
        source: name of the file.
        options: further ones of the compiler.

    Raises:
        CannotCompileError: see there.
    """
    command = (*find_compiler(), *OPTIONS, *options)
    try:
        made = _folder() / f"{Path(source).stem}-{_digest(source, command)}.so"
        if not _is_whole(made):
            _compile(source, command, made)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompileError(f"{source} was not compiled with {command[0]}: {error}") from error
    try:
        return ctypes.CDLL(str(made))
    except OSError as error:
        raise CannotCompileError(f"{made} cannot be loaded: {error}") from error


@cache
def find_compiler() -> tuple[str, ...]:
    """Return the compiler's command: that which CXX names, else the first of `COMPILERS` that is installed.

    Raises:
        CannotCompileError: there is none.
    """
    asked = os.environ.get("CXX")
    names = shlex.split(asked) if asked is not None else next(([x] for x in COMPILERS if shutil.which(x)), [])
    if not names or shutil.which(names[0]) is None:
        missing = (
            f"CXX={asked} is no command"
            if asked is not None
            else f"none of {', '.join(COMPILERS)} is installed"
        )
        raise CannotCompileError(f"{missing}; a C++ compiler makes models on a CPU faster")
    return tuple(names)


def _compile(source: str, command: tuple[str, ...], made: Path) -> None:
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        out = Path(scratch) / made.name
        given = (*command, str(SOURCES / source), "-o", str(out))
        done = subprocess.run(given, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), "it says nothing")
            raise CannotCompileError(f"{command[0]} does not compile {source}: {said.strip()}")
        content = out.read_bytes()
        out.write_bytes(content + hashlib.sha256(content).digest())
        # Processes that compile the same at a time each put a whole file here.
        out.replace(made)
    logger.info("compiled %s into %s", source, made)


def _is_whole(made: Path) -> bool:
    """Whether a library is there as it was written, its checksum behind it: half of one would end the process."""
    if not made.exists():
        return False
    content = made.read_bytes()
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _digest(source: str, command: tuple[str, ...]) -> str:
    """Return what a library depends on, as a short name: text, command, compiler and processor."""
    hashed = hashlib.sha256()
    for path in (SOURCES / source, *sorted(SOURCES.glob("*.h"))):
        hashed.update(path.read_bytes())
    hashed.update(" ".join(command).encode())
    version = subprocess.run((*find_compiler(), "--version"), capture_output=True, check=False).stdout
    hashed.update(version)
    hashed.update(_processor().encode())
    return hashed.hexdigest()[:16]


def _processor() -> str:
    """Return what this processor is and can, since a home may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        line for line in lines if line.startswith(("model name", "flags", "CPU part", "Features"))
    )


@cache
def _folder() -> Path:
    """Return where libraries are kept: a folder that only this user can write to, else one for this process."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "ascendspeed" / "kernels"
    try:
        folder = folder.expanduser()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        is_own = found.st_uid == os.geteuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK)
        reason = "" if is_own else "others can write to it, or this user cannot"
    except (OSError, RuntimeError) as error:
        reason = str(error)
    if not reason:
        return folder
    logger.info("%s is not used (%s): C++ is compiled anew in each process", folder, reason)
    own = tempfile.mkdtemp(prefix="ascendspeed-kernels-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return Path(own)
