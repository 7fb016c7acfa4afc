"""Make a config from a TOML recipe and the flags that were given; flags win."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ascendspeed_core.config.migrate import FORMAT_VERSION, VERSION_KEY, describe_moves, migrate_config
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import ConfigError, did_you_mean
from ascendspeed_data.hub import hub_name
from ascendspeed_data.hub_files import What, data_paths, local_path
from ascendspeed_data.small_files import read_toml

Model = TypeVar("Model", bound=BaseModel)


def load_config(
    config: type[Model], recipe: Path | None, given: dict[str, Any], say: Callable[[str], None] = log
) -> Model:
    """Return `config` made of a recipe's sections, overridden by flags.

    A recipe of release 0.1.0 is read too, with a line that says how to rewrite it.

    Args:
        config: a config whose fields are sections (configs) themselves.
        recipe: TOML file with those sections, or `None`.
        given: flags by field name; the names of all sections' fields are distinct.
        say: called with the line about an old recipe.

    Raises:
        ConfigError: an unreadable recipe, an unknown section or key, a value outside its range.
    """
    return validate(config, merged_sections(config, recipe, given, say))


def merged_sections(
    config: type[Model], recipe: Path | None, given: dict[str, Any], say: Callable[[str], None] = log
) -> dict[str, dict[str, Any]]:
    """Return the values of each section of a config, unchecked: those of a recipe, overridden by flags.

    Names on hubs become the folders of what they name, which is fetched.

    Raises:
        ConfigError: an unreadable recipe, an unknown section or key.
        AscendSpeedError: a name on a hub cannot be fetched.
    """
    sections = {name: _section(field.annotation) for name, field in config.model_fields.items()}
    merged: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for section, values in (_read_recipe(recipe, say) if recipe else {}).items():
        if section not in sections:
            raise ConfigError(f"{recipe}: unknown section [{section}]{did_you_mean(section, sections)}")
        for key, value in values.items() if isinstance(values, dict) else [(section, values)]:
            names = sections[section].model_fields
            if key not in names:
                where = next((s for s, c in sections.items() if key in c.model_fields), None)
                hint = f"; it belongs in [{where}]" if where else did_you_mean(key, names)
                raise ConfigError(f"{recipe}: unknown key {key} in [{section}]{hint}")
            merged[section][key] = value
    for key, value in given.items():
        section = next(name for name, inner in sections.items() if key in inner.model_fields)
        merged[section][key] = value
    for section, values in merged.items():
        merged[section] = {key: _fetched(key, value) for key, value in values.items()}
    return merged


FROM_HUBS: dict[str, What] = {
    "load": "model", "tokenizer_name_or_path": "tokenizer", "lora_load": "adapter", "reference": "model",
    "data": "data",
}  # fmt: skip
"""Options that take a name on a hub for a path, and what is fetched."""


def _fetched(key: str, value: Any) -> Any:
    """Return a value with the folders of names on hubs in their place."""
    what = FROM_HUBS.get(key)
    if what is None or not value:
        return value
    if isinstance(value, list | tuple):
        return tuple(path for one in value for path in data_paths(str(one), key))
    return local_path(value, what, key) if hub_name(str(value)) else value


def validate(config: type[Model], values: dict[str, Any], strict: bool = False) -> Model:
    """Return `config(**values)`, with pydantic's complaint as one line.

    Args:
        config: the config.
        values: its fields, as JSON values.
        strict: a text is no number, and a number no switch; flags may be texts, files may not.

    Raises:
        ConfigError: a value breaks a rule.
    """
    try:
        if strict:
            return config.model_validate_json(json.dumps(values), strict=True)
        return config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_first_complaint(error)) from None


def _section(annotation: Any) -> type[BaseModel]:
    assert isinstance(annotation, type)
    assert issubclass(annotation, BaseModel)
    return annotation


def _read_recipe(recipe: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the sections of a recipe, in those of today."""
    sections, moves = migrate_config(
        read_toml(recipe, f"recipe {recipe}", ConfigError, "--config"), str(recipe)
    )
    if moves:
        say(
            f"{recipe}: read as a recipe of release 0.1.0; to bring it up to date, move {describe_moves(moves)}, and "
            f"begin it with {VERSION_KEY} = {FORMAT_VERSION}"
        )
    return sections


def _first_complaint(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][-1]) if first["loc"] else ""
    if name.isdecimal() and len(first["loc"]) > 1:
        name = f"{first['loc'][-2]}[{name}]"
    if first["type"] == "value_error":
        return message
    if first["type"] == "missing" or (first["type"] == "too_short" and not first["input"]):
        return f"{name} is missing; give --{name.replace('_', '-')}"
    return f"{name}={first['input']!r}: {message[0].lower()}{message[1:]}"
