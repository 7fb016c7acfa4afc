"""Write the tables of docs/recipes.md from the recipes: `python scripts/recipes_page.py`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ascendspeed_core.commands.recipes import forecast_of, layout_of
from ascendspeed_core.config.recipes import FOLDER, find_recipe, read_recipe, recipe_names
from ascendspeed_core.planner.hardware import load_profile
from ascendspeed_core.planner.plan_report import GIB

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
MARK = "<!-- Written by scripts/recipes_page.py from the recipes; change them and run it again. -->"
GENERATION = ROOT / "packages/ascendspeed-infer/src/ascendspeed_infer/recipes"
EVALUATION = ROOT / "packages/ascendspeed-eval/src/ascendspeed_eval/recipes"

IN_2023 = {
    "baichuan-7b": (1914, 2068), "baichuan-13b": (1024, 824), "bloom-7b1": (2611, 2525), "bloom-176b": (100, 107),
    "internlm-7b": (2777, 2800), "llama-7b": (2862, 2859), "llama-13b": (1800, 1734), "llama-65b": (234, 260),
    "llama2-7b": (2460, 2348),
}  # fmt: skip
"""Tokens per device and second of the README of 2023: on NPUs, and of its reference."""


PLANNED_FOR = ("ascend-910b3", "h100-sxm")

PLANNED = """Planned is what `asd-core recipes --device PROFILE` says ([Planning](planning.md)): memory of the fullest \
rank with 8 % for the allocator, and tokens of full samples; of pairs both answers count. Nothing of it was measured \
on these devices. The figures of 2023 are those of its README, for its own hyper-parameters and an Ascend 910 that it \
does not name more closely; the plan takes a 910B3, whose one calibration is on these nine rates."""


def training_rows() -> Iterator[str]:
    yield (
        "| recipe | command | devices | layout | samples x tokens of a step | planned GiB of a device | planned "
        "tokens/s per 910B3 | per H100 | 2023: per NPU (reference) |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    profiles = [load_profile(name) for name in PLANNED_FOR]
    for name in recipe_names(FOLDER):
        recipe = read_recipe(find_recipe(name, FOLDER))
        table, batch = recipe["recipe"], recipe["batch"]
        before = IN_2023.get(name)
        planned = [forecast_of(name, profile) for profile in profiles]
        yield _row(
            f"`{name}`",
            table["command"],
            table["devices"],
            layout_of(recipe),
            f"{batch['global_batch_size']:,} x {recipe['data']['seq_length']:,}",
            f"{planned[0].memory.total / GIB:.1f}",
            *(f"{one.tokens_per_second:,.0f}" for one in planned),
            f"{before[0]:,} ({before[1]:,})" if before else "",
        )


def generation_rows() -> Iterator[str]:
    yield "| recipe of `asd-infer generate` | model | devices | layout |"
    yield "|---|---|---|---|"
    for name in recipe_names(GENERATION):
        recipe = read_recipe(find_recipe(name, GENERATION))
        table = recipe["recipe"]
        yield _row(f"`{name}`", table["model"], table["devices"], layout_of(recipe))


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def page() -> str:
    """Return the page: its own text, then the tables."""
    own = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    tasks = ", ".join(f"`{path.stem}`" for path in sorted(EVALUATION.glob("*.toml")))
    lines = [
        MARK, "", "## All recipes", "", *training_rows(), "",
        PLANNED, "", *generation_rows(), "", f"Recipes of `asd-eval run`: {tasks}.",
    ]  # fmt: skip
    return own + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
