"""The untrusted side: confine this process, then run the program.

Started by path, so it imports only the standard library.

Arguments: scratch folder, file descriptor of the secret, file descriptor of the verdict, limits of memory and file
size in bytes, limit of processor time in seconds.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from pathlib import Path

NOBODY = 65534
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE = 1, 22, 38, 4
SIGKILL = 9

# Audit number of the architecture, then system call numbers (Linux, arch/*/entry/syscalls, include/uapi/asm-generic).
X86_64 = (
    0xC000003E,
    {
        "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "clone3": 435, "kill": 62, "tkill": 200,
        "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424, "socket": 41,
        "socketpair": 53, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "unshare": 272,
        "setns": 308, "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setsid": 112, "setpgid": 109,
        "bpf": 321, "perf_event_open": 298, "keyctl": 250, "add_key": 248, "request_key": 249, "io_uring_setup": 425,
        "userfaultfd": 323, "setpriority": 141, "sched_setaffinity": 203, "shmget": 29, "semget": 64, "msgget": 68,
        "mq_open": 240, "memfd_create": 319, "pidfd_open": 434, "pidfd_getfd": 438, "reboot": 169, "swapoff": 168,
        "prlimit64": 302, "setrlimit": 160,
    },
)  # fmt: skip
AARCH64 = (
    0xC00000B7,
    {
        "clone": 220, "execve": 221, "execveat": 281, "clone3": 435, "kill": 129, "tkill": 130, "tgkill": 131,
        "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424, "socket": 198, "socketpair": 199,
        "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "unshare": 97, "setns": 268, "mount": 40,
        "umount2": 39, "pivot_root": 41, "chroot": 51, "setsid": 157, "setpgid": 154, "bpf": 280,
        "perf_event_open": 241, "keyctl": 219, "add_key": 217, "request_key": 218, "io_uring_setup": 425,
        "userfaultfd": 282, "setpriority": 140, "sched_setaffinity": 122, "shmget": 194, "semget": 190, "msgget": 186,
        "mq_open": 180, "memfd_create": 279, "pidfd_open": 434, "pidfd_getfd": 438, "reboot": 142, "swapoff": 225,
        "prlimit64": 261, "setrlimit": 164,
    },
)  # fmt: skip
ARCHITECTURES = {"x86_64": X86_64, "aarch64": AARCH64}

LOAD, JUMP_IF_EQUAL, JUMP_IF_SET, JUMP_IF_NOT_BELOW, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000
NUMBER_OFFSET, ARCHITECTURE_OFFSET, FIRST_ARGUMENT_OFFSET = 0, 4, 16
CLONE_THREAD = 0x00010000
X32_BIT = 0x40000000


def _filter(architecture: int, numbers: dict[str, int]) -> list[tuple[int, int, int, int]]:
    """Return the BPF program: threads are allowed, processes, signals, sockets and the rest fail."""
    code = [
        (LOAD, 0, 0, ARCHITECTURE_OFFSET),
        (JUMP_IF_EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_OFFSET),
        (JUMP_IF_NOT_BELOW, 0, 1, X32_BIT),
        (RETURN, 0, 0, FAIL | errno.ENOSYS),
        (JUMP_IF_EQUAL, 0, 1, numbers["clone3"]),
        (RETURN, 0, 0, FAIL | errno.ENOSYS),
        (JUMP_IF_EQUAL, 0, 4, numbers["clone"]),
        (LOAD, 0, 0, FIRST_ARGUMENT_OFFSET),
        (JUMP_IF_SET, 0, 1, CLONE_THREAD),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, FAIL | errno.EAGAIN),
    ]
    for name, number in numbers.items():
        if name not in ("clone", "clone3"):
            code += [(JUMP_IF_EQUAL, 0, 1, number), (RETURN, 0, 0, FAIL | errno.EPERM)]
    return [*code, (RETURN, 0, 0, ALLOW)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def limit_system_calls(libc: ctypes.CDLL) -> bool:
    """Install the seccomp filter; return whether the kernel accepted it."""
    if platform.machine() not in ARCHITECTURES:
        return False
    code = _filter(*ARCHITECTURES[platform.machine()])
    packed = b"".join(struct.pack("HBBI", *line) for line in code)
    program = _Program(len(code), packed)
    return bool(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) == 0)


LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ_RIGHTS = 1 | 4 | 8  # execute, read file, read folder
WRITE_RIGHTS_BY_ABI = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF}


def limit_files(libc: ctypes.CDLL, scratch: str) -> bool:
    """With Landlock, allow only Python's files and the scratch folder; return whether the kernel has it."""
    abi = libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if abi < 1:
        return False
    handled = WRITE_RIGHTS_BY_ABI[min(abi, 3)]
    attributes = struct.pack("Q", handled)
    ruleset = libc.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(8), ctypes.c_uint(0))
    if ruleset < 0:
        return False
    readable = {
        str(Path(os.__file__).parent),
        sys.base_prefix + "/lib",
        "/usr/lib",
        "/lib",
        "/lib64",
        "/usr/share/zoneinfo",
    }
    rules = [(path, READ_RIGHTS) for path in readable] + [
        (scratch, handled & ~1),
        ("/dev/null", 2 | 4),
        ("/dev/urandom", 4),
    ]
    for path, rights in rules:
        try:
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not Path(path).is_dir():
            rights &= 1 | 2 | 4
        rule = struct.pack("=Qi", rights, folder)
        if libc.syscall(LANDLOCK_ADD, ruleset, ctypes.c_int(1), rule, ctypes.c_uint(0)) < 0:
            return False
        os.close(folder)
    done = libc.syscall(LANDLOCK_RESTRICT, ruleset, ctypes.c_uint(0)) == 0
    os.close(ruleset)
    return bool(done)


def leave_root() -> bool:
    """Switch from root to nobody if nobody can read Python's files; return whether it worked."""
    if not all(folder.stat().st_mode & 0o001 for folder in Path(os.__file__).parents):
        return False
    if os.getuid() != 0:
        return False
    try:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return False
    return True


def drop_capabilities(libc: ctypes.CDLL) -> bool:
    """Drop all capabilities; return whether the kernel accepted it."""
    header = struct.pack("Ii", 0x20080522, 0)
    return bool(libc.capset(header, struct.pack("6I", *[0] * 6)) == 0)


def confine(scratch: str, memory_bytes: int, file_bytes: int, seconds: int) -> list[str]:
    """Give up everything that the program does not need; return the names of the active protections."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    for what, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(what, (value, value))
    held = ["user"] if leave_root() else []
    resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
    held += ["capabilities"] if drop_capabilities(libc) else []
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    held += ["landlock"] if limit_files(libc, scratch) else []
    held += ["seccomp"] if limit_system_calls(libc) else []
    return held


def main() -> None:
    """Confine this process, run the program, and report."""
    scratch, secret_in, verdict_out, memory_bytes, file_bytes, seconds = sys.argv[1:7]
    secret = os.read(int(secret_in), 64)
    os.close(int(secret_in))
    program = (Path(scratch) / "program.py").read_bytes().decode("utf-8", "surrogatepass")
    held = confine(scratch, int(memory_bytes), int(file_bytes), int(seconds))
    os.write(int(verdict_out), (" ".join(held) + "\n").encode())
    sys.argv = ["program.py"]
    names = {"__name__": "__main__"}
    code = compile(program, "program.py", "exec")
    exec(code, names)
    os.write(int(verdict_out), secret + b"\n")


if __name__ == "__main__":
    main()
