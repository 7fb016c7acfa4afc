"""Lock an output, so that a second run on it fails. The lock ends with the process that holds it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ascendspeed_data.errors import AscendSpeedError


@contextmanager
def output_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` during the `with` block; the file is created if absent.

    Args:
        path: lock file, next to or inside the output.
        what: the output as the user named it, for the message.

    Raises:
        AscendSpeedError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise AscendSpeedError(
                f"{what} is being written by another run (process {owner}); wait for it, or choose another output"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
