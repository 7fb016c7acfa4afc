"""Ctrl-C and a full disk end a command with one line: what is kept, and how to go on."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ascendspeed_data.errors import AscendSpeedError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, the user's share of it, or what the file system allows for one file."""


class InterruptedRunError(AscendSpeedError):
    """Ctrl-C ended a command; the exit status is that of a process that SIGINT ended."""

    exit_code = 130


@contextmanager
def keeping(kept: Callable[[], str]) -> Iterator[None]:
    """Say what is kept when Ctrl-C or a full disk ends what is inside.

    Args:
        kept: called then; returns what is kept and how to go on.

    Raises:
        InterruptedRunError: Ctrl-C.
        AscendSpeedError: no space is left.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(f"interrupted; {kept()}") from None
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise AscendSpeedError(f"{no_space(error)}; {kept()}") from None


def no_space(error: OSError) -> str:
    """Say that a disk is full, and where if that is known."""
    where = f" for {error.filename}" if error.filename else ""
    return f"no space is left on the disk{where} ({error.strerror}); free some"
