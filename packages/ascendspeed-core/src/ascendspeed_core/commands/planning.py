"""`asd-core plan`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ascendspeed_core.config.load import validate
from ascendspeed_core.config.planning import PlanConfig
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.errors import ConfigError


@options_from(PlanConfig)
def plan(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    **given: Any,
) -> None:
    """Say before the launch what fits on some devices, how fast it will be, and why.

    It searches tensor, pipeline, context and expert parallelism, schedules, sharding, recompute and micro-batches, from
    one device to a hundred thousand. It needs neither the devices nor torch.
    """
    from ascendspeed_core.planner.plan_report import plan_json, plan_lines
    from ascendspeed_core.planner.question import make_question
    from ascendspeed_core.planner.search import search

    config = validate(PlanConfig, given)
    question, content = make_question(config)
    found = search(question)
    if as_json:
        print(json.dumps(plan_json(question, found, config.top, config.tokens), indent=1))
    else:
        print("\n".join(plan_lines(question, found, config.top, config.tokens)))
    if config.charts is not None:
        from ascendspeed_core.planner.plan_charts import draw_plans

        log("charts: " + ", ".join(map(str, draw_plans(question, found, config.charts))))
    if config.recipe is not None:
        if not found.fitting:
            raise ConfigError(f"recipe={config.recipe}: no plan fits, so there is none to write; see above")
        write_recipe(config, question, found.fitting[0], content)


def write_recipe(config: PlanConfig, question: Any, best: Any, content: dict[str, Any]) -> None:
    """Write the best plan, and the model's config.json beside it."""
    from ascendspeed_core.planner.plan_report import recipe_sections, recipe_text

    assert config.recipe is not None
    model_file = Path(f"{config.recipe.with_suffix('')}.model.json")
    sections = {"start": {"model_config_file": str(model_file)}} | recipe_sections(
        question, best, config.tokens
    )
    comments = [
        f"asd-core plan --model {config.model} --device {config.device} --devices {config.devices}",
        f"{best.tokens_per_second:,.0f} tokens/s of each device, {best.memory.total / (1 << 30):.1f} GiB, by the plan",
    ]
    config.recipe.parent.mkdir(parents=True, exist_ok=True)
    model_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    config.recipe.write_text(recipe_text(sections, comments), encoding="utf-8")
    log(
        f"{config.recipe}: asd-core pretrain --config {config.recipe} --data-path PREFIX"
        + ("" if config.tokens else " --train-iters N")
    )
