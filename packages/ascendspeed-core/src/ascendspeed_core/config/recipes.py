"""Recipes by name: TOML files of this package, each a tested starting point for one model and one stage of training.

A recipe has the sections of a config, and `[recipe]`, which says what it is for. A `base` there names a file whose
values it takes over; a note on a value, with its source, stands in the comments that the file begins with.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from ascendspeed_core.config.base import Config
from ascendspeed_core.config.migrate import FORMAT_VERSION, VERSION_KEY
from ascendspeed_data.errors import ConfigError, did_you_mean
from ascendspeed_data.small_files import read_text, read_toml

FOLDER = Path(__file__).parents[1] / "recipes"
"""The recipes of `asd-core`; files whose names begin with an underscore are bases of others."""

TABLE = "recipe"


def _internal(default: Any, description: str, **rule: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"internal": True}, **rule)


class RecipeConfig(Config):
    """What a recipe is for; a checkpoint keeps it with the options of its run."""

    name: str | None = _internal(None, "Name of the recipe.")
    command: str | None = _internal(None, "Command that runs it.")
    model: str | None = _internal(None, "Published size that it is for; `asd-core models` lists them.")
    devices: int | None = _internal(None, "Devices that its layout is for.", ge=1)


def recipe_names(folder: Path = FOLDER) -> list[str]:
    """Return the names of all recipes of a package."""
    return sorted(path.stem for path in folder.glob("*.toml") if not path.stem.startswith("_"))


def find_recipe(name: str, folder: Path = FOLDER) -> Path:
    """Return the file of a recipe: one of the package by its name, or a TOML file by its path.

    Raises:
        ConfigError: there is none.
    """
    names = recipe_names(folder)
    if name in names:
        return folder / f"{name}.toml"
    if name.endswith(".toml") or "/" in name:
        return Path(name)
    close = did_you_mean(name, names) or f"; known: {', '.join(names)}"
    raise ConfigError(f"{name} is no recipe{close}")


@cache
def recipe_comments(path: Path) -> tuple[str, ...]:
    """Return the comment lines that a recipe begins with, after those of its base."""
    lines = read_text(
        path, f"recipe {path}", "save it as UTF-8", ConfigError, "the name of the recipe"
    ).splitlines()
    first = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    base = _base_of(read_toml(path, f"recipe {path}", ConfigError), path)
    return (*(recipe_comments(base) if base is not None else ()), *lines[:first])


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the sections of a recipe, those of its base included; what it says itself wins.

    Raises:
        ConfigError: a file cannot be read, or bases go in a circle.
    """
    return _read(path, ())


def _read(path: Path, before: tuple[Path, ...]) -> dict[str, Any]:
    if path in before:
        raise ConfigError(f"recipe {path} is a base of itself; correct [{TABLE}] base")
    own = read_toml(path, f"recipe {path}", ConfigError, "the name of the recipe")
    base = _base_of(own, path)
    if base is None:
        return own
    merged: dict[str, Any] = dict(_read(base, (*before, path)))
    for section, values in own.items():
        under = merged.get(section)
        if isinstance(values, dict) and isinstance(under, dict):
            merged[section] = {**under, **values}
        else:
            merged[section] = values
    merged[TABLE].pop("base", None)
    return merged


def _base_of(sections: Mapping[str, Any], path: Path) -> Path | None:
    table = sections.get(TABLE)
    base = table.get("base") if isinstance(table, dict) else None
    return None if base is None else path.parent / f"{base}.toml"


def written_recipe(sections: Mapping[str, Mapping[str, Any]], comments: tuple[str, ...] = ()) -> str:
    """Return a recipe as the text of a TOML file, for `--config` or to be changed.

    Args:
        sections: its sections with their keys; `None` is left out.
        comments: lines to begin with.
    """
    lines = [*comments, f"{VERSION_KEY} = {FORMAT_VERSION}"]
    for section, values in sections.items():
        if isinstance(values, Mapping) and values:
            lines += ["", f"[{section}]"]
            lines += [f"{key} = {_written(value)}" for key, value in values.items() if value is not None]
    return "\n".join(lines) + "\n"


def _written(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    # TOML's strings, numbers and truth values are JSON's, but for floats without a point.
    return json.dumps(value if isinstance(value, int | float | str) else str(value), ensure_ascii=False)
