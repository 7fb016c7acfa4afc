"""Shared by all AscendSpeed commands: lazy commands, options from configs, progress, errors as one line.

`options` is not imported here, because it imports pydantic and would slow `--help` down.
"""

from ascendspeed_data.command_line.app import Command, build_app
from ascendspeed_data.command_line.progress import Progress, announce, log
from ascendspeed_data.command_line.running import run_and_exit, run_app

__all__ = ["Command", "Progress", "announce", "build_app", "log", "run_and_exit", "run_app"]
