"""`asd-core dpo`."""

from typing import Any

from ascendspeed_core.commands.pretrain import DryRun, Recipe, run_training
from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.preference import DpoConfig
from ascendspeed_core.launch import announce
from ascendspeed_data.command_line.options import options_from


@options_from(DpoConfig)
def dpo(config: Recipe = None, dry_run: DryRun = False, **given: Any) -> None:
    """Tune a checkpoint on pairs of a chosen and a rejected answer (direct preference optimization).

    --data-path names pairs made by a pair handler of asd-data; batch sizes count pairs. --load outside
    of --save starts a new run from its weights; --load equal to --save, or --auto-resume, resumes, with the reference
    model that the run began with. Layouts, precision, recompute and what --save holds are those of `asd-core pretrain`.
    """
    run_training(load_config(DpoConfig, config, given, announce), dry_run)
