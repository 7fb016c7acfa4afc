"""Recipes by name: TOML files of this package, each the options of `asd-eval run` for one benchmark."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import UsageError
from ascendspeed_eval.small_files import read_toml

FOLDER = Path(__file__).with_name("recipes")


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: one of this package by its name, or a TOML file by its path.

    Raises:
        UsageError: there is none.
    """
    if name in recipe_names():
        return FOLDER / f"{name}.toml"
    if name.endswith(".toml") or "/" in name:
        return Path(name)
    close = get_close_matches(name, recipe_names(), n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(recipe_names())}"
    raise UsageError(f"{name} is no recipe; {hint}")


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the options of a recipe.

    Raises:
        EvaluationError: the file cannot be read, or is not TOML.
    """
    return read_toml(path, f"recipe {path}", "the name of the recipe")


def recipe_options(name: str, known: Sequence[str]) -> dict[str, Any]:
    """Return the options of a recipe by name, or of a file by its path.

    Args:
        name: of the recipe.
        known: options that the command has.

    Raises:
        UsageError: there is no such recipe, or it has an option that the command lacks.
        EvaluationError: the file cannot be read.
    """
    path = find_recipe(name)
    options = read_recipe(path)
    unknown = sorted(options.keys() - set(known))
    if unknown:
        close = get_close_matches(unknown[0], known, n=1)
        raise UsageError(
            f"recipe {path}: unknown key {unknown[0]}{f'; did you mean {close[0]}?' if close else ''}"
        )
    return options
