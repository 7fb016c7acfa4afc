"""The commands of the five packages with their options, as they are when a user asks for help."""

import importlib
from functools import cache
from typing import Any

from typer.main import get_command

from support.commands import MODULES


@cache
def all_commands() -> dict[str, dict[str, Any]]:
    """By `asd-core pretrain`: its options, by each of their spellings."""
    found: dict[str, dict[str, Any]] = {}
    for program, module in MODULES.items():
        app = importlib.import_module(module)
        tool = importlib.import_module(app.build_app.__module__)
        group: Any = get_command(app.app)
        for name, row in group.table.items():
            command: Any = tool._as_typer_command(row)
            found[f"{program} {name}"] = {
                flag: param for param in command.params for flag in (*param.opts, *param.secondary_opts)
            }
    return found
