"""Write files so that a crash leaves the old content or the new one, and say so when a disk is full."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ascendspeed_data.errors import AscendSpeedError

INCOMPLETE = ".incomplete"
"""Ending of what is not whole yet."""


def write_durably(path: Path, content: str | bytes) -> None:
    """Replace a file's content in one step, flushed to the disk; text is written as UTF-8."""
    scratch = path.with_name(path.name + INCOMPLETE)
    with scratch.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


@contextmanager
def full_disk_named(output: Path, remedy: str) -> Iterator[None]:
    """Turn a full disk into one line.

    Args:
        output: what was being written.
        remedy: what to do once there is room.

    Raises:
        AscendSpeedError: there is no space left.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise AscendSpeedError(f"no space left for {output}; {remedy}") from None
