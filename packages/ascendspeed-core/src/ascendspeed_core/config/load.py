"""Make a config from a TOML recipe and the flags that were given; flags win."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ascendspeed_core.config.migrate import FORMAT_VERSION, VERSION_KEY, describe_moves, migrate_config
from ascendspeed_core.config.recipes import FOLDER, TABLE, find_recipe, read_recipe
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import ConfigError, did_you_mean
from ascendspeed_data.hub import hub_name
from ascendspeed_data.hub_files import What, data_paths, local_path
from ascendspeed_data.small_files import read_toml

Model = TypeVar("Model", bound=BaseModel)

Sections = dict[str, dict[str, Any]]
"""The values of each section of a config."""


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe that a command is to run.

    Attributes:
        name: of a recipe of the package, or the path of a TOML file.
        command: that is to run it.
        folder: the recipes of the package.
    """

    name: str
    command: str
    folder: Path = FOLDER

    def sections(self, config: type[BaseModel]) -> Sections:
        """Return its values by section, as those of the config of its command.

        Raises:
            ConfigError: it is unknown, cannot be read, or another command runs it.
        """
        path = find_recipe(self.name, self.folder)
        content, _ = migrate_config(read_recipe(path), str(path))
        table = content.get(TABLE, {})
        command = table.get("command", self.command) if isinstance(table, dict) else self.command
        if command != self.command:
            raise ConfigError(
                f"{self.name} is a recipe of the command {command}, not of {self.command}; run that"
            )
        found = _sorted_sections(config, content, f"recipe {self.name}")
        if TABLE in config.model_fields:
            found.setdefault(TABLE, {})["name"] = path.stem
        return found


def load_config(
    config: type[Model],
    recipe: Path | None,
    given: dict[str, Any],
    say: Callable[[str], None] = log,
    named: NamedRecipe | None = None,
) -> Model:
    """Return `config` made of a recipe's sections, overridden by flags.

    A recipe of release 0.1.0 is read too, with a line that says how to rewrite it.

    Args:
        config: a config whose fields are sections (configs) themselves.
        recipe: TOML file with those sections, or `None`.
        given: flags by field name; the names of all sections' fields are distinct.
        say: called with the line about an old recipe.
        named: the recipe that a command runs by name; `recipe` wins over it.

    Raises:
        ConfigError: an unreadable recipe, an unknown section or key, a value outside its range.
    """
    return validate(config, merged_sections(config, recipe, given, say, named))


def merged_sections(
    config: type[Model],
    recipe: Path | None,
    given: dict[str, Any],
    say: Callable[[str], None] = log,
    named: NamedRecipe | None = None,
) -> Sections:
    """Return the values of each section of a config, unchecked: those of a recipe, overridden by flags.

    Names on hubs become the folders of what they name, which is fetched.

    Raises:
        ConfigError: an unreadable recipe, an unknown section or key.
        AscendSpeedError: a name on a hub cannot be fetched.
    """
    merged: Sections = {name: {} for name in config.model_fields}
    if named is not None:
        _lay_over(merged, named.sections(config), say)
    if recipe is not None:
        _lay_over(merged, _sorted_sections(config, _read_recipe(recipe, say), str(recipe)), say)
    sections = {name: _section(field.annotation) for name, field in config.model_fields.items()}
    flags: Sections = {}
    for key, value in given.items():
        section = next(name for name, inner in sections.items() if key in inner.model_fields)
        flags.setdefault(section, {})[key] = value
    _lay_over(merged, flags, say)
    _start_from_size(merged)
    for section, values in merged.items():
        merged[section] = {key: _fetched(key, value) for key, value in values.items()}
    return merged


def _start_from_size(merged: Sections) -> None:
    """Let pre-training by a recipe begin with random weights of its size, unless it is said with what to begin."""
    table, start = merged.get(TABLE, {}), merged.get("start", {})
    if table.get("command") == "pretrain" and table.get("model") and not start.get("load"):
        start.setdefault("model_config_file", table["model"])


def _sorted_sections(config: type[Model], content: dict[str, Any], name: str) -> Sections:
    """Return the values of a TOML file by section.

    Raises:
        ConfigError: a section or a key that the config lacks.
    """
    sections = {name: _section(field.annotation) for name, field in config.model_fields.items()}
    found: Sections = {}
    for section, values in content.items():
        if section not in sections:
            raise ConfigError(f"{name}: unknown section [{section}]{did_you_mean(section, sections)}")
        for key, value in values.items() if isinstance(values, dict) else [(section, values)]:
            names = sections[section].model_fields
            if key not in names:
                where = next((s for s, c in sections.items() if key in c.model_fields), None)
                hint = f"; it belongs in [{where}]" if where else did_you_mean(key, names)
                raise ConfigError(f"{name}: unknown key {key} in [{section}]{hint}")
            found.setdefault(section, {})[key] = value
    return found


_ONE_OF = (
    ("train_iters", "train_samples", "num_train_epochs"),
    ("lr_decay_iters", "lr_decay_samples"),
    ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction"),
    ("dtype", "fp16", "bf16"),
    ("data", "data_path", "train_data_path"),
    ("zero_stage", "use_distributed_optimizer"),
    ("zero_stage", "deepspeed"),
)
"""Options that say the same in different ways: one that is given takes the place of another of a recipe."""

_DISPLACED = {
    "lora_load": ("lora_target_modules", "lora_r", "lora_alpha", "lora_dropout", "lora_use_rslora"),
    "model_config_file": ("model",),
}
"""What of a recipe an option takes the place of."""


def _lay_over(merged: Sections, over: Sections, say: Callable[[str], None]) -> None:
    """Let values win over those of a recipe, in place, and say what they take the place of."""
    new = {key: value for values in over.values() for key, value in values.items()}
    gone = {
        other
        for key, value in new.items()
        for group in (*(group for group in _ONE_OF if key in group), _DISPLACED.get(key, ()))
        for other in group
        if value and other not in new
    }
    left_out = sorted(gone & {key for values in merged.values() for key in values})
    if left_out:
        say(f"recipe: {', '.join(left_out)} left out; options that were given take the place")
    for section in merged:
        kept = {key: value for key, value in merged[section].items() if key not in gone}
        merged[section] = kept | over.get(section, {})


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
    """Return `config(**values)`, with pydantic's complaints as one line.

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
        raise ConfigError(_complaints(error)) from None


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


def _complaints(error: ValidationError) -> str:
    """Return all complaints as one line."""
    return "; also: ".join(dict.fromkeys(_complaint(dict(found)) for found in error.errors()))


def _complaint(found: Mapping[str, Any]) -> str:
    message = str(found["msg"]).removeprefix("Value error, ")
    name = str(found["loc"][-1]) if found["loc"] else ""
    if name.isdecimal() and len(found["loc"]) > 1:
        name = f"{found['loc'][-2]}[{name}]"
    if found["type"] == "value_error":
        return message
    if found["type"] == "missing" or (found["type"] == "too_short" and not found["input"]):
        return f"{name} is missing; give --{name.replace('_', '-')}"
    return f"{name}={found['input']!r}: {message[0].lower()}{message[1:]}"
