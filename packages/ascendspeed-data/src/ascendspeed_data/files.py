"""Write small files so that a crash leaves the old content or the new one."""

import os
from pathlib import Path

INCOMPLETE = ".incomplete"
"""Ending of what is not whole yet."""


def write_durably(path: Path, text: str) -> None:
    """Replace a file's content in one step, flushed to the disk."""
    scratch = path.with_name(path.name + INCOMPLETE)
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
