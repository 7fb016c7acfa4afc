"""`asd-core dpo`."""

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
from ascendspeed_core.config.preference import DpoConfig
from ascendspeed_data.command_line.options import options_from


@options_from(DpoConfig)
def dpo(
    recipe: RecipeName = None,
    config: Recipe = None,
    dry_run: DryRun = False,
    preflight_only: PreflightOnly = False,
    **given: Any,
) -> None:
    """Tune a checkpoint on pairs of a chosen and a rejected answer (direct preference optimization).

    --data-path names pairs made by a pair handler of asd-data, --data FILE the records themselves; batch sizes count
    pairs. --load outside of --save starts a new run from its weights; --load equal to --save, or --auto-resume,
    resumes, with the reference model that the run began with. Layouts, precision, recompute and what --save holds are
    those of `asd-core pretrain`.
    """
    named = named_recipe(recipe, "dpo")
    run_training(config_with_records(DpoConfig, config, given, "pairs", named), dry_run, preflight_only)
