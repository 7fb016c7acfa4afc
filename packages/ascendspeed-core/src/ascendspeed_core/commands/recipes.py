"""`asd-core recipes`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ascendspeed_core.config.finetune import FinetuneConfig
from ascendspeed_core.config.load import NamedRecipe, load_config, validate
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.preference import DpoConfig
from ascendspeed_core.config.recipes import (
    FOLDER,
    TABLE,
    RecipeConfig,
    find_recipe,
    read_recipe,
    recipe_comments,
    recipe_names,
    written_recipe,
)
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.planner.forecast import Forecast, forecast
from ascendspeed_core.planner.hardware import HardwareProfile, load_profile
from ascendspeed_core.planner.plan_report import GIB, aligned
from ascendspeed_core.planner.question import read_model
from ascendspeed_data.errors import ConfigError

CONFIGS: dict[str, type[PretrainConfig]] = {
    "pretrain": PretrainConfig, "finetune": FinetuneConfig, "dpo": DpoConfig
}  # fmt: skip
"""Options of each command that recipes are for."""


def recipes(
    name: Annotated[str | None, typer.Argument(help="Recipe to print. [default: list all]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per recipe.")] = False,
    device: Annotated[
        str | None,
        typer.Option(
            help="Say what each takes on such devices, by the plan: a profile such as ascend-910b3, or a file of "
            "`asd-core profile-device`."
        ),
    ] = None,
) -> None:
    """List the recipes, or print one: a TOML file with a note on each value that is not its model's own.

    A command runs one by its name: asd-core pretrain llama-7b --data-path DATA --save RUN. To change more of it than
    flags should, write it down and give the file by --config.
    """
    if device is None:
        print_recipes(FOLDER, name, as_json)
        return
    profile = load_profile(device)
    found = {one: forecast_of(one, profile) for one in (recipe_names() if name is None else [name])}
    if as_json:
        for one, takes in found.items():
            print(json.dumps({"name": one, "device": profile.name, **takes.as_json()}))
    else:
        print("\n".join(forecast_table(found, profile)))


def forecast_table(forecasts: Mapping[str, Forecast], profile: HardwareProfile) -> list[str]:
    """Return what recipes take on devices of a profile as aligned lines."""
    columns = "recipe devices layout GiB of tokens/s/device computing recompute messages bubble optimizer"
    rows: list[Sequence[str]] = [columns.split()]
    for name, found in forecasts.items():
        sections = read_recipe(find_recipe(name))
        shares = found.seconds.shares()
        sent = shares["model_messages"] + shares["reduction"]
        rows.append(
            (name, str(sections[TABLE]["devices"]), layout_of(sections), f"{found.memory.total / GIB:.1f}",
             f"{profile.memory_bytes / GIB:.0f}", f"{found.tokens_per_second:,.0f}",
             *(f"{share:.1%}" for share in (shares["compute"], shares["recompute"], sent, shares["bubble"],
                                            shares["update"])))
        )  # fmt: skip
    return aligned(rows)


def forecast_of(name: str, profile: HardwareProfile) -> Forecast:
    """Return what a recipe takes on devices of a profile, as many as its layout is for.

    Raises:
        ConfigError: the devices lack the recipe's format, or the recipe does not say what it is for.
    """
    table = read_recipe(find_recipe(name)).get(TABLE)
    purpose = validate(RecipeConfig, dict(table) if isinstance(table, dict) else {})
    command = purpose.command or ""
    if command not in CONFIGS or purpose.model is None or purpose.devices is None:
        raise ConfigError(
            f"recipe {name}: [recipe] must have command ({', '.join(CONFIGS)}), model (a size of `asd-core models`) "
            "and devices to say what it takes; add them"
        )
    start = {} if command == "pretrain" else {"load": Path("model")}
    config = load_config(
        CONFIGS[command], None, {"data_path": ["data"], **start}, lambda _: None, NamedRecipe(name, command)
    )
    model, _ = read_model(purpose.model)
    found = forecast(config, model, config.parallel.layout(purpose.devices), profile)
    if found is None:
        raise ConfigError(
            f"recipe {name}: no formula knows the memory of its recompute; leave --device out, or change "
            "checkpoint_policy in a file of your own"
        )
    return found


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
