"""`asd-core finetune`."""

from typing import Any

from ascendspeed_core.commands.pretrain import (
    DryRun,
    PreflightOnly,
    Recipe,
    RecipeName,
    named_recipe,
    run_training,
)
from ascendspeed_core.commands.records import config_with_records
from ascendspeed_core.config.finetune import FinetuneConfig
from ascendspeed_data.command_line.options import options_from


@options_from(FinetuneConfig)
def finetune(
    recipe: RecipeName = None,
    config: Recipe = None,
    dry_run: DryRun = False,
    preflight_only: PreflightOnly = False,
    **given: Any,
) -> None:
    """Train a checkpoint further: on an instruction set (--is-instruction-dataset), or on plain text.

    --data FILE takes the records themselves (messages and other formats), and makes samples of them first.
    --load outside of --save starts a new run from its weights. --load equal to --save, or --auto-resume, resumes.
    Layouts, precision, recompute and what --save holds are those of `asd-core pretrain`.
    """
    named = named_recipe(recipe, "finetune")
    run_training(
        config_with_records(FinetuneConfig, config, given, "samples", named), dry_run, preflight_only
    )
