"""Write files atomically, and report a full disk as one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ascendspeed_data.command_line.stopping import NO_SPACE
from ascendspeed_data.errors import AscendSpeedError

INCOMPLETE = ".incomplete"
"""Suffix of incomplete files."""


def write_durably(path: Path, content: str | bytes) -> None:
    """Replace a file atomically and flush it to the disk; a crash leaves the old or the new content. Text is UTF-8."""
    scratch = path.with_name(path.name + INCOMPLETE)
    with scratch.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


@contextmanager
def full_disk_named(output: Path, remedy: str) -> Iterator[None]:
    """Report a full disk as one line.

    Args:
        output: path of the output, for the message.
        remedy: what the user should do, for the message.

    Raises:
        AscendSpeedError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise AscendSpeedError(f"no space left on the disk of {output}; {remedy}") from None
