"""`asd-core recipes`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ascendspeed_core.config.load import validate
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.recipes import (
    FOLDER,
    TABLE,
    find_recipe,
    read_recipe,
    recipe_comments,
    recipe_names,
    written_recipe,
)


def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print. [default: list all]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per recipe.")] = False,
) -> None:
    """List the recipes, or print one: a TOML file with a note on each value that is not its model's own.

    A command runs one by its name: asd-core pretrain llama-7b --data-path DATA --save RUN. To change more of it than
    flags should, write it down and give the file by --config.
    """
    print_recipes(FOLDER, name, as_json)


def print_recipes(folder: Path, name: str | None, as_json: bool) -> None:
    """Print the recipes of a package as a table, or one of them as TOML.

    Args:
        folder: the recipes.
        name: of one recipe.
        as_json: print their sections as JSON, one recipe a line.
    """
    names = recipe_names(folder) if name is None else [name]
    found = {one: read_recipe(find_recipe(one, folder)) for one in names}
    if as_json:
        for one, sections in found.items():
            print(json.dumps({"name": one, **sections}))
    elif name is not None:
        comments = recipe_comments(find_recipe(name, folder))
        print(written_recipe(found[name], comments), end="")
    else:
        print("\n".join(recipe_table(found)))


def recipe_table(recipes: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of recipes as aligned lines.

    Args:
        recipes: their sections, by name.
    """
    rows = [("recipe", "model", "command", "devices", "layout")]
    for name, sections in sorted(recipes.items(), key=lambda item: (str(item[1][TABLE]["model"]), item[0])):
        table = sections[TABLE]
        rows.append((name, table["model"], table["command"], str(table["devices"]), layout_of(sections)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]])
        for row in rows
    ]


def layout_of(sections: dict[str, Any]) -> str:
    """Return the layout of a recipe on the devices that it is for, in words."""
    parallel = sections.get("parallel", sections.get("layout", {}))
    return str(validate(ParallelConfig, dict(parallel)).layout(sections[TABLE]["devices"]))
