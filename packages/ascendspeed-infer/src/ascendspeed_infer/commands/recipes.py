"""`asd-infer recipes`."""

from typing import Annotated

import typer

from ascendspeed_core.commands.recipes import print_recipes
from ascendspeed_infer.commands.generate import RECIPES


def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print. [default: list all]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per recipe.")] = False,
) -> None:
    """List the recipes of generation, or print one as TOML.

    A recipe is run by its name: asd-infer generate bloom-7b1 --load MODEL --prompt TEXT --nproc-per-node 8.
    """
    print_recipes(RECIPES, name, as_json)
