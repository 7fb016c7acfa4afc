"""Run a command where some system calls fail, as in containers. Usage: fewer_calls.py NAME[,NAME...] COMMAND...

Names: `namespaces` (unshare), `landlock`, `mounts` (mount), `seccomp` (prctl's second mode and the call seccomp).
"""

import ctypes
import errno
import os
import platform
import struct
import sys

CALLS = {
    "x86_64": {"namespaces": [272], "landlock": [444], "mounts": [165]},
    "aarch64": {"namespaces": [97], "landlock": [444], "mounts": [40]},
}
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
PRCTL = {"x86_64": 157, "aarch64": 167}


def main() -> None:
    """Install the filter, then become the command."""
    machine = platform.machine()
    names = sys.argv[1].split(",")
    numbers = [n for name in names if name != "seccomp" for n in CALLS[machine][name]]
    lines = [(0x20, 0, 0, 0)]
    for number in numbers:
        lines += [(0x15, 0, 1, number), (0x06, 0, 0, 0x00050000 | errno.EPERM)]
    if "seccomp" in names:
        fail = (0x06, 0, 0, 0x00050000 | errno.EINVAL)
        lines += [(0x15, 0, 3, PRCTL[machine]), (0x20, 0, 0, 16), (0x15, 0, 1, PR_SET_SECCOMP), fail]
    lines.append((0x06, 0, 0, 0x7FFF0000))
    packed = b"".join(struct.pack("HBBI", *line) for line in lines)

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(Program(len(lines), packed)), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no filter")
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
