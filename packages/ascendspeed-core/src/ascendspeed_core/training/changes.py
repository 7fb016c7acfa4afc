"""Say what a resumed run does otherwise than the run that wrote its checkpoint."""

from collections.abc import Iterator, Mapping
from typing import Any

from ascendspeed_core.config.training import PretrainConfig

SECTIONS = (
    "batch",
    "training",
    "optimizer",
    "loss_scaling",
    "dropout",
    "precision",
    "data",
    "evaluation",
    "lora",
)
"""Sections whose options decide what is trained on and how; layouts, kernels and logs change no result."""


def changed_options(before: Mapping[str, Any], config: PretrainConfig) -> Iterator[str]:
    """Yield a line for each option that differs: its name, its value in the checkpoint, and its value from here on.

    Args:
        before: the config that the checkpoint keeps, in the sections of today; older ones may lack options.
        config: of the run that goes on.
    """
    now = config.model_dump(mode="json")
    for section in SECTIONS:
        theirs, ours = before.get(section), now.get(section)
        if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
            continue
        for name, value in ours.items():
            if name in theirs and theirs[name] != value:
                yield f"resuming with another {name}: {_shown(theirs[name])} until here, {_shown(value)} from here on"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
