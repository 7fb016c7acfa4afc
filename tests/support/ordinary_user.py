"""Run a command as a user without rights, or as root, with a Python that every user can read.

Usage, as root: ordinary_user.py USER COMMAND..., USER being a number. Where Python lies in a folder that only root may
enter, such as /root, a mount namespace shows it in an open one.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NEW_MOUNTS, BIND, RECURSIVE, PRIVATE = 0x20000, 4096, 16384, 1 << 18


def closed_folder(path: Path) -> Path | None:
    """Return the topmost folder on the way to a path that others may not enter."""
    closed = [one for one in reversed(path.resolve().parents) if not one.stat().st_mode & 0o001]
    return closed[0] if closed else None


def open_the_way(path: Path) -> None:
    """Show a folder at its path to others, and nothing else of the closed folder above it."""
    closed = closed_folder(path)
    if closed is None:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    steps = [libc.unshare(NEW_MOUNTS)]
    opened = os.open(path.resolve(), os.O_PATH)
    steps += [
        libc.mount(None, b"/", None, ctypes.c_ulong(RECURSIVE | PRIVATE), None),
        libc.mount(b"tmpfs", os.fsencode(closed), b"tmpfs", ctypes.c_ulong(0), b"mode=0755"),
    ]
    path.resolve().mkdir(parents=True)
    source = f"/proc/self/fd/{opened}".encode()
    steps.append(
        libc.mount(source, os.fsencode(path.resolve()), None, ctypes.c_ulong(BIND | RECURSIVE), None)
    )
    if any(steps):
        raise OSError(ctypes.get_errno(), f"cannot show {path} to others: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    """Become the user and run the command."""
    open_the_way(Path(sys.base_prefix))
    with tempfile.TemporaryDirectory(prefix="ordinary-") as folder:
        user = int(sys.argv[1])
        os.chown(folder, user, user)
        done = subprocess.run(
            sys.argv[2:],
            user=user,
            group=user,
            extra_groups=[],
            env={**os.environ, "HOME": folder, "TMPDIR": folder},
            check=False,
        )
    sys.exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)


if __name__ == "__main__":
    main()
