"""Options of `model.generate` in 2023, under their names of today."""

from collections.abc import Mapping
from typing import Any

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import ConfigError

RENAMED_OPTIONS = {
    "include_input": "echo",
    "return_output_log_probs": "return_log_probs",
    "eos_token_id": "eos_token_ids",
}
"""Names of 2023, and the options of today that they stand for."""

IGNORED_OPTIONS = {
    "recompute": "keys and values are always kept",
    "bos_token_id": "the tokenizer's own setting decides what begins a text",
    "pad_token_id": "texts of unequal length are batched without padding ids",
}
"""Options of 2023 that are no choice today, and why."""


def rename_legacy_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return options under their names of today; those without effect are dropped with a line on stderr.

    Raises:
        ConfigError: an option under both names, or one that belongs elsewhere today.
    """
    if given.get("tokenizer") is not None:
        raise ConfigError(
            "tokenizer is an option of LanguageModel.from_pretrained, not of generate; give it there"
        )
    options = {}
    for name, value in given.items():
        if name in IGNORED_OPTIONS:
            log(f"{name} has no effect: {IGNORED_OPTIONS[name]}")
        elif name != "tokenizer":
            today = RENAMED_OPTIONS.get(name, name)
            if today in options:
                raise ConfigError(f"{name} and {today} are the same option; give one")
            options[today] = value
    return options
