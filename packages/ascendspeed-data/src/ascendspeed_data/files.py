"""Write small files so that a crash leaves the old content or the new one."""

import os
from pathlib import Path

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
