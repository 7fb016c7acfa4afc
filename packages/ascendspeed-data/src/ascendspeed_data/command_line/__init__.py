"""What all AscendSpeed commands share: lazy commands, options made from configs, errors as one line.

`options` is not imported here: it needs pydantic, which `--help` of an application must not pay for.
"""

from ascendspeed_data.command_line.app import Command, build_app, run_app
from ascendspeed_data.command_line.progress import Progress, log

__all__ = ["Command", "Progress", "build_app", "log", "run_app"]
