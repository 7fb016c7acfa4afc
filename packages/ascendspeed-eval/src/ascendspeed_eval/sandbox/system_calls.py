"""The system calls of a confined process: an allow-list, as a seccomp filter.

Runs in the processes of the sandbox, so it imports only the standard library. Numbers are those of Linux
(arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
"""

import ctypes
import errno
import os
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType

AUDIT_NUMBERS = MappingProxyType({"x86_64": 0xC000003E, "aarch64": 0xC00000B7})
"""By architecture, in the order of the columns below."""

ALLOWED: Mapping[str, tuple[int | None, int | None]] = MappingProxyType(
    {
        "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
        "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "close": (3, 57),
        "close_range": (436, 436), "open": (2, None), "openat": (257, 56), "creat": (85, None), "stat": (4, None),
        "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291), "lseek": (8, 62),
        "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
        "readlinkat": (267, 78), "getdents": (78, None), "getdents64": (217, 61), "getcwd": (79, 17),
        "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59),
        "mkdir": (83, None), "mkdirat": (258, 34), "unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None),
        "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "symlink": (88, None),
        "symlinkat": (266, 36), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
        "fadvise64": (221, 223), "fsync": (74, 82), "fdatasync": (75, 83), "chdir": (80, 49), "fchdir": (81, 50),
        "umask": (95, 166), "sendfile": (40, 71), "copy_file_range": (326, 285),
        "statfs": (137, 43), "fstatfs": (138, 44), "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226),
        "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "membarrier": (324, 283),
        "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
        "rt_sigpending": (127, 136), "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133),
        "sigaltstack": (131, 132), "pause": (34, None), "restart_syscall": (219, 128), "getitimer": (36, 102),
        "setitimer": (38, 103), "alarm": (37, None), "clock_gettime": (228, 113), "clock_getres": (229, 114),
        "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None),
        "times": (100, 153), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
        "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getgroups": (115, 158),
        "getresuid": (118, 148), "getresgid": (120, 150), "getpgid": (121, 155), "getpgrp": (111, None),
        "getsid": (124, 156), "getrusage": (98, 165), "getrlimit": (97, 163), "getpriority": (140, 141),
        "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168), "sysinfo": (99, 179),
        "uname": (63, 160), "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94), "futex": (202, 98),
        "futex_waitv": (449, 449), "set_robust_list": (273, 99), "set_tid_address": (218, 96), "rseq": (334, 293),
        "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
        "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
        "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19),
    }
)  # fmt: skip
"""Numbers on x86_64 and aarch64. Files, memory, threads, clocks, polling, and what a process may ask about itself.

Left out on purpose, so refused: every way to send a signal, to start or trace a process, to open a socket or a queue,
to change mode, owner, times or attributes of a file, to lock files or memory, to change priorities, limits or
identities, to mount, and to make files that have no name (memfd_create) or more than one (link).
"""

WAITING: Mapping[str, tuple[int | None, int | None]] = MappingProxyType(
    {"wait4": (61, 260), "waitid": (247, 95)}
)
"""What the process of the tests needs besides, to learn how the process of the answer ended."""

FCNTL, IOCTL, PRCTL, PRLIMIT, CLONE, CLONE3, OPENAT2 = (
    (72, 25),
    (16, 29),
    (157, 167),
    (302, 261),
    (56, 220),
    435,
    437,
)
PIVOT_ROOT = MappingProxyType({"x86_64": 155, "aarch64": 41})
LAST_KNOWN = 462

# Commands of fcntl: duplicate, flags of a descriptor and of a file, size of a pipe. F_SETOWN, F_SETSIG, F_SETLEASE and
# F_NOTIFY, which send signals, are none of them, nor are locks, which others would see; F_SETFL may not set O_ASYNC.
FCNTL_COMMANDS = (0, 1, 2, 3, 1030, 1032)
F_SETFL, O_ASYNC = 4, 0x2000
# FIOCLEX, FIONCLEX, FIONREAD, FIONBIO, TCGETS, TIOCGWINSZ. FIOASYNC, FIOSETOWN, SIOCSPGRP and TIOCSTI are none of them.
IOCTL_COMMANDS = (0x5451, 0x5450, 0x541B, 0x5421, 0x5401, 0x5413)
# PR_SET_NAME, PR_GET_NAME, PR_SET_VMA (names of memory, which malloc gives).
PRCTL_COMMANDS = (15, 16, 0x53564D41)
CLONE_THREAD, CLONE_NEW_NAMESPACES = 0x00010000, 0x7E020000

LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
REFUSE, UNKNOWN = FAIL | errno.EPERM, FAIL | errno.ENOSYS
NUMBER_OFFSET, ARCHITECTURE_OFFSET, ARGUMENTS_OFFSET = 0, 4, 16
X32_BIT = 0x40000000
PR_SET_SECCOMP = 22

Line = tuple[int, int, int, int]


def limit_system_calls(libc: ctypes.CDLL, *, may_wait: bool) -> bool:
    """Install the filter for this process and its threads; there is no way back.

    Args:
        libc: the C library.
        may_wait: allow waiting for a child.

    Returns:
        Whether the kernel accepted it.
    """
    if os.uname().machine not in AUDIT_NUMBERS:
        return False
    lines = _filter(os.uname().machine, {**ALLOWED, **(WAITING if may_wait else {})})
    packed = b"".join(struct.pack("HBBI", *line) for line in lines)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    program = Program(len(lines), packed)
    return bool(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) == 0)


def _filter(machine: str, allowed: Mapping[str, tuple[int | None, int | None]]) -> list[Line]:
    """Return the BPF program."""
    column = list(AUDIT_NUMBERS).index(machine)
    lines: list[Line] = [
        (LOAD, 0, 0, ARCHITECTURE_OFFSET),
        (EQUAL, 1, 0, AUDIT_NUMBERS[machine]),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_OFFSET),
        (AT_LEAST, 0, 1, X32_BIT),
        (RETURN, 0, 0, UNKNOWN),
    ]
    for numbers in allowed.values():
        if (number := numbers[column]) is not None:
            lines += _when_equal(number, [(RETURN, 0, 0, ALLOW)])
    only_first_arguments: tuple[tuple[tuple[int, int], int, Sequence[int], list[Line]], ...] = (
        (FCNTL, 1, FCNTL_COMMANDS, [*_when_equal(F_SETFL, [_argument(2), *_unless(O_ASYNC)])]),
        (IOCTL, 1, IOCTL_COMMANDS, []),
        (PRCTL, 0, PRCTL_COMMANDS, []),
    )
    for numbers, argument, commands, more in only_first_arguments:
        checks = [_argument(argument), *more]
        for command in commands:
            checks += _when_equal(command, [(RETURN, 0, 0, ALLOW)])
        lines += _when_equal(numbers[column], [*checks, (RETURN, 0, 0, REFUSE)])
    threads = [_argument(0), (ANY_BIT, 0, 1, CLONE_NEW_NAMESPACES), (RETURN, 0, 0, REFUSE)]
    threads += [(ANY_BIT, 0, 1, CLONE_THREAD), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, FAIL | errno.EAGAIN)]
    lines += _when_equal(CLONE[column], threads)
    lines += _when_equal(PRLIMIT[column], _only_reading_own_limits())
    # Their arguments lie in memory, out of a filter's sight; programs fall back to older calls where they do not exist.
    lines += _when_equal(CLONE3, [(RETURN, 0, 0, UNKNOWN)]) + _when_equal(OPENAT2, [(RETURN, 0, 0, UNKNOWN)])
    return [*lines, (AT_LEAST, 0, 1, LAST_KNOWN + 1), (RETURN, 0, 0, UNKNOWN), (RETURN, 0, 0, REFUSE)]


def _when_equal(value: int, then: Sequence[Line]) -> list[Line]:
    """Return lines that run `then`, which ends with a RETURN, where the loaded number is `value`."""
    return [(EQUAL, 0, len(then), value), *then]


def _unless(bits: int) -> list[Line]:
    return [(ANY_BIT, 0, 1, bits), (RETURN, 0, 0, REFUSE), (RETURN, 0, 0, ALLOW)]


def _argument(number: int, *, high: bool = False) -> Line:
    """Return a line that loads 32 bits of an argument; both architectures are little-endian."""
    return (LOAD, 0, 0, ARGUMENTS_OFFSET + 8 * number + 4 * high)


def _only_reading_own_limits() -> list[Line]:
    """Return checks of prlimit64: process 0, which is the caller, and no new limit."""
    checks: list[Line] = []
    for line in (_argument(0), _argument(2), _argument(2, high=True)):
        checks += [line, (EQUAL, 1, 0, 0), (RETURN, 0, 0, REFUSE)]
    return [*checks, (RETURN, 0, 0, ALLOW)]
