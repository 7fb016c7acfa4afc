"""Recipes by name: TOML files of this package, each the options of `asd-eval run` for one benchmark."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

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


Kind = Literal["flag", "value", "list"]
"""What an option of a command takes: nothing, one value, or several."""


def recipe_options(name: str, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Return the options of a recipe by name, or of a file by its path.

    Args:
        name: of the recipe.
        kinds: what each option of the command takes, by its name.

    Raises:
        UsageError: there is no such recipe, or it has an option that the command lacks, or takes otherwise.
        EvaluationError: the file cannot be read.
    """
    path = find_recipe(name)
    options = read_recipe(path)
    for key, value in options.items():
        if key not in kinds:
            close = get_close_matches(key, list(kinds), n=1)
            raise UsageError(
                f"recipe {path}: unknown key {key}{f'; did you mean {close[0]}?' if close else ''}"
            )
        parts = value if isinstance(value, list) and kinds[key] == "list" else [value]
        is_flag = kinds[key] == "flag"
        if any(isinstance(part, list | dict) or isinstance(part, bool) != is_flag for part in parts):
            wanted = {"flag": "true or false", "value": "one value", "list": "a list of values"}[kinds[key]]
            raise UsageError(f"recipe {path}: {key} is not {wanted}; correct it")
        options[key] = parts if kinds[key] == "list" else value
    return options
