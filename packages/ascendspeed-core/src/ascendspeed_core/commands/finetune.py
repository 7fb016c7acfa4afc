"""`asd-core finetune`."""

from typing import Any

from ascendspeed_core.commands.pretrain import DryRun, Recipe, run_training
from ascendspeed_core.config.finetune import FinetuneConfig
from ascendspeed_core.config.load import load_config
from ascendspeed_core.launch import announce
from ascendspeed_data.command_line.options import options_from


@options_from(FinetuneConfig)
def finetune(config: Recipe = None, dry_run: DryRun = False, **given: Any) -> None:
    """Train a checkpoint further: on an instruction set (--is-instruction-dataset), or on plain text.

    --load outside of --save starts a new run from its weights. --load equal to --save, or --auto-resume, resumes.
    Layouts, precision, recompute and what --save holds are those of `asd-core pretrain`.
    """
    run_training(load_config(FinetuneConfig, config, given, announce), dry_run)
