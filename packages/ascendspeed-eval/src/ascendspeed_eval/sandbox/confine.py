"""Confine this process for good: limits, user, capabilities, Landlock, seccomp.

Runs in the processes of the sandbox, so it imports only the standard library.
"""

import ctypes
import os
import resource
import signal
import stat
import struct
import sys
from pathlib import Path
from typing import NamedTuple

from ascendspeed_eval.sandbox.system_calls import limit_system_calls

NOBODY = 65534
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CAPABILITY_VERSION_3 = 0x20080522


class Limits(NamedTuple):
    """Resource limits of one process.

    Attributes:
        memory_bytes: address space.
        file_bytes: size of any one file.
        seconds: processor time.
        threads: of the user.
    """

    memory_bytes: int
    file_bytes: int
    seconds: int
    threads: int


class Confinement(NamedTuple):
    """What is left to one process.

    Attributes:
        limits: resource limits.
        user: number of the user that root becomes.
        readable: the folders that may be read.
        writable: the only folder that may be written, if any.
        in_new_root: the root folder holds nothing but Python's folders and the writable one.
        may_wait: whether it may wait for a child.
    """

    limits: Limits
    user: int
    readable: tuple[str, ...]
    writable: str | None
    in_new_root: bool
    may_wait: bool


def confine(libc: ctypes.CDLL, left: Confinement) -> list[str]:
    """Give up everything that running Python code does not need.

    Returns:
        The protections that hold, besides limits: `user` (root became another user), `capabilities`, `landlock`,
        `seccomp`.
    """
    limits = left.limits
    for what, value in (
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_CPU, limits.seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))
    held = ["user"] if _leave_root(left) else []
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    threads = limits.threads if hard == resource.RLIM_INFINITY else min(limits.threads, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))
    held += ["capabilities"] if _drop_capabilities(libc) else []
    # A change of user resets both, so they come after it.
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    held += ["landlock"] if _limit_files(libc, left) else []
    held += ["seccomp"] if limit_system_calls(libc, may_wait=left.may_wait) else []
    return held


def python_folders() -> list[str]:
    """Return the folders that Python code is read from, shared libraries included; none lies in another."""
    prefixes = {sys.base_prefix, sys.base_exec_prefix, "/usr", "", "/usr/local"}
    found = {*sys.path, str(Path(os.__file__).parent), "/usr/share/zoneinfo", *_folders_of_loaded_libraries()}
    found |= {f"{prefix}/{name}" for prefix in prefixes for name in ("lib", "lib64")}
    for store in ("/nix/store", "/gnu/store"):  # There each library has a folder of its own.
        found |= {store} if Path(os.__file__).resolve().is_relative_to(store) else set()
    found = {path for path in found if Path(path).is_dir()}
    return sorted(path for path in found if not any(path.startswith(other + "/") for other in found))


def _folders_of_loaded_libraries() -> set[str]:
    try:
        lines = os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines()
    except OSError:
        return set()
    paths = [line.split(None, 5)[-1].strip() for line in lines if ".so" in line]
    return {str(Path(path).parent) for path in paths if path.startswith("/")}


def others_can_read_python(*, with_parents: bool) -> bool:
    """Return whether another user can read Python's own files.

    Args:
        with_parents: check the folders above, too; a new root folder has its own.
    """
    file = Path(os.__file__).resolve()
    folders = file.parents if with_parents else file.parents[:1]
    return bool(file.stat().st_mode & stat.S_IROTH) and all(
        folder.stat().st_mode & stat.S_IXOTH for folder in folders
    )


def has_capability(number: int) -> bool:
    """Return whether this process has a capability."""
    libc = ctypes.CDLL(None)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(struct.pack("Ii", CAPABILITY_VERSION_3, 0), data) != 0:
        return False
    return bool(data[3 * (number // 32)] >> number % 32 & 1)


def _leave_root(left: Confinement) -> bool:
    """Switch from root to a user that has nothing, if that user can read Python's files."""
    if os.geteuid() != 0 or not others_can_read_python(with_parents=not left.in_new_root):
        return False
    for number in (left.user, NOBODY):
        try:
            os.setgroups([])
            os.setresgid(number, number, number)
            os.setresuid(number, number, number)
        except OSError:
            continue  # A container may lack this user.
        return True
    return False


def _drop_capabilities(libc: ctypes.CDLL) -> bool:
    header = struct.pack("Ii", CAPABILITY_VERSION_3, 0)
    return bool(libc.capset(header, struct.pack("6I", *[0] * 6)) == 0)


LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_RIGHTS = 1 | 4 | 8  # execute, read file, read folder
# By version of the kernel's interface: all rights on files, all on TCP, and what no longer reaches outside.
FILE_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
TCP_RIGHTS, ABSTRACT_SOCKETS, SIGNALS = 0b11, 1, 2


def _limit_files(libc: ctypes.CDLL, left: Confinement) -> bool:
    """With Landlock, allow only Python's files and the writable folder."""
    version = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return False
    handled = FILE_RIGHTS[min(version, 5)]
    attributes = struct.pack("Q", handled)
    attributes += struct.pack("Q", TCP_RIGHTS) if version >= 4 else b""
    # When the tests die, the kernel sends the answer a signal in their name; this must arrive.
    scopes = ABSTRACT_SOCKETS if left.may_wait else ABSTRACT_SOCKETS | SIGNALS
    attributes += struct.pack("Q", scopes) if version >= 6 else b""
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    if ruleset < 0:
        return False
    rules: list[tuple[str, int]] = [(path, READ_RIGHTS) for path in left.readable]
    rules += [("/etc/ld.so.cache", 4), ("/dev/null", 2 | 4), ("/dev/zero", 4), ("/dev/urandom", 4)]
    if left.writable is not None:
        rules.append((left.writable, handled & ~1))
    allowed = all(_allow(libc, ruleset, path, rights) for path, rights in rules)
    done = allowed and libc.syscall(LANDLOCK_RESTRICT, ruleset, ctypes.c_uint(0)) == 0
    os.close(ruleset)
    return bool(done)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> bool:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return True  # Nothing there, so nothing to allow.
    if not stat.S_ISDIR(os.fstat(opened).st_mode):
        rights &= 1 | 2 | 4
    rule = struct.pack("=Qi", rights, opened)
    added = libc.syscall(LANDLOCK_ADD, ruleset, ctypes.c_int(1), rule, ctypes.c_uint(0))
    os.close(opened)
    return bool(added == 0)


def threads_of_user(user: int) -> int:
    """Return how many threads a user has, as far as /proc shows them."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            count += len(list((process / "task").iterdir())) if process.stat().st_uid == user else 0
        except OSError:
            continue  # It has ended.
    return count
