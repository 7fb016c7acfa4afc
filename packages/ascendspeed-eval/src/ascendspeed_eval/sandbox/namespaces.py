"""A world of its own for a process: namespaces, and a root folder that holds only Python and a scratch folder.

Runs in the processes of the sandbox, so it imports only the standard library.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ascendspeed_eval.sandbox.confine import has_capability
from ascendspeed_eval.sandbox.system_calls import PIVOT_ROOT

SCRATCH = "/scratch"
OLD_ROOT = "/old-root"
CAP_SYS_ADMIN = 21
NEW_MOUNTS, NEW_HOST_NAME, NEW_QUEUES, NEW_USERS, NEW_PROCESSES, NEW_NETWORK = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
READ_ONLY, NO_SET_USER, NO_DEVICES, NO_EXECUTION, REMOUNT, BIND, RECURSIVE, SLAVE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 19,
)  # fmt: skip
UNMOUNT_LATER = 2
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class NamespaceError(Exception):
    """The kernel refused a step."""


class ScratchLimits(NamedTuple):
    """Limits of the scratch folder.

    Attributes:
        total_bytes: size of all files together.
        files: number of files and folders.
    """

    total_bytes: int
    files: int


def enter_namespaces(libc: ctypes.CDLL, readable: Sequence[str]) -> list[str]:
    """Move this process to namespaces of its own, for itself and the programs that it starts one after another.

    Network and root folder are new; the root folder holds Python's folders, read-only, and three devices.

    Args:
        libc: the C library.
        readable: the folders that the new root shows.

    Returns:
        The protections that hold.

    Raises:
        NamespaceError: the kernel refused a step; the process is in no usable state.
    """
    sources = [(Path(path), Path(path).resolve(), Path(path).is_symlink()) for path in readable]
    user, group = os.geteuid(), os.getegid()
    flags = NEW_MOUNTS | NEW_HOST_NAME | NEW_QUEUES | NEW_NETWORK
    held = ["mount namespace", "network namespace"]
    if not (has_capability(CAP_SYS_ADMIN) and libc.unshare(flags) == 0):
        _check(libc.unshare(flags | NEW_USERS), "unshare")
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
        held.append("user namespace")
    libc.sethostname(b"sandbox", ctypes.c_size_t(7))
    _mount(libc, "", "/", "", RECURSIVE | SLAVE, "no mount reaches the outside")
    _new_root(libc)
    for path, source, is_link in sources:
        if is_link and source in {real for _, real, link in sources if not link}:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(source)
        else:
            _bind_folder(libc, f"{OLD_ROOT}{source}", path)
    for file in (*DEVICES, "/etc/ld.so.cache"):
        _bind_file(libc, file)
    Path(SCRATCH).mkdir()
    _check(libc.umount2(OLD_ROOT.encode(), UNMOUNT_LATER), "umount2")
    Path(OLD_ROOT).rmdir()
    _mount(libc, "", "/", "", REMOUNT | BIND | READ_ONLY | NO_SET_USER | NO_DEVICES, "root folder read-only")
    return held


def enter_program_namespaces(libc: ctypes.CDLL, limits: ScratchLimits) -> list[str]:
    """Give one program namespaces of its own and a scratch folder, which is memory of limited size.

    The next child is number 1 among its processes. When it ends, the kernel kills the others, and the folder goes.

    Args:
        libc: the C library.
        limits: of the scratch folder.

    Returns:
        The protections that hold.

    Raises:
        NamespaceError: the kernel refused a step.
    """
    _check(libc.unshare(NEW_MOUNTS | NEW_QUEUES | NEW_PROCESSES), "unshare")
    options = f"mode=0777,size={limits.total_bytes},nr_inodes={limits.files}"
    flags = NO_SET_USER | NO_DEVICES | NO_EXECUTION
    _mount(libc, "tmpfs", SCRATCH, "tmpfs", flags, "scratch folder", options)
    os.chdir(SCRATCH)
    return ["pid namespace"]


def _new_root(libc: ctypes.CDLL) -> None:
    """Make an empty folder in memory the root; the old one is below it."""
    mount_point = "/tmp" if Path("/tmp").is_dir() else "/usr"
    _mount(libc, "tmpfs", mount_point, "tmpfs", NO_SET_USER | NO_DEVICES, "tmpfs", "mode=0755,size=1m")
    Path(mount_point + OLD_ROOT).mkdir()
    if os.uname().machine not in PIVOT_ROOT:
        raise NamespaceError(f"pivot_root: unknown on {os.uname().machine}")
    old = (mount_point + OLD_ROOT).encode()
    number = ctypes.c_long(PIVOT_ROOT[os.uname().machine])
    _check(libc.syscall(number, mount_point.encode(), old), "pivot_root")
    os.chdir("/")


def _bind_folder(libc: ctypes.CDLL, source: str, path: Path) -> None:
    """Show a folder at a path, read-only, with everything that is mounted below it."""
    path.mkdir(parents=True, exist_ok=True)
    _mount(libc, source, str(path), "", BIND | RECURSIVE, f"bind {path}")
    for point in _mount_points(str(path)):
        flags = REMOUNT | BIND | READ_ONLY | NO_SET_USER | NO_DEVICES | _kept_flags(point)
        _mount(libc, "", point, "", flags, f"{point} read-only")


def _kept_flags(point: str) -> int:
    """Return the flags of a mount that a remount must repeat, since its owner set them.

    statvfs has the numbers of mount, but for relatime.
    """
    flags = os.statvfs(point).f_flag
    return flags & (NO_SET_USER | NO_DEVICES | NO_EXECUTION | 1024 | 2048) | (1 << 21 if flags & 4096 else 0)


def _mount_points(folder: str) -> list[str]:
    """Return the folder and what is mounted below it."""
    lines = Path(OLD_ROOT, "proc/self/mountinfo").read_bytes().splitlines()
    points = [os.fsdecode(_without_escapes(line.split()[4])) for line in lines]
    return sorted({folder, *(point for point in points if point.startswith(folder + "/"))})


def _without_escapes(path: bytes) -> bytes:
    for escaped, meant in ((b"\\040", b" "), (b"\\011", b"\t"), (b"\\012", b"\n"), (b"\\134", b"\\")):
        path = path.replace(escaped, meant)
    return path


def _bind_file(libc: ctypes.CDLL, path: str) -> None:
    """Show a file or device, read-only, where the old root has it."""
    if not Path(OLD_ROOT + path).exists():
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).touch()
    _mount(libc, OLD_ROOT + path, path, "", BIND, f"bind {path}")
    _mount(
        libc, "", path, "", REMOUNT | BIND | READ_ONLY | NO_SET_USER | _kept_flags(path), f"{path} read-only"
    )


def _mount(
    libc: ctypes.CDLL, source: str, target: str, kind: str, flags: int, step: str, options: str = ""
) -> None:
    arguments = [os.fsencode(text) or None for text in (source, target, kind)]
    done = libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(options) or None)
    _check(done, f"mount ({step})")


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="ascii")
    except OSError as error:
        raise NamespaceError(f"{path}: {error.strerror}") from None


def _check(result: int, step: str) -> None:
    if result != 0:
        raise NamespaceError(f"{step}: {os.strerror(ctypes.get_errno())}")
