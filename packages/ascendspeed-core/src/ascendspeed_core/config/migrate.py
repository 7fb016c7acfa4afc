"""Read the configs of earlier releases: TOML recipes, and the `run` that a checkpoint keeps.

A config says with `format_version` in which sections its keys lie. Release 0.1.0 wrote no version; its configs are
version 1. Each later version has one table here of what moved, so that every older config can still be read.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from ascendspeed_data.errors import ConfigError

FORMAT_VERSION = 2
"""Version of the configs that this release writes."""

VERSION_KEY = "format_version"

_FIRST_VERSION = 1

_MOVED_IN_2: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "start": {
        "checkpoint": ("save", "save_interval", "async_save", "keep_checkpoints", "save_retain_interval")
    },
    "batch": {
        "training": ("train_iters", "train_samples", "exit_interval", "seed"),
        "evaluation": ("eval_interval", "eval_iters"),
        "logging": ("log_interval",),
    },
    "samples": {"eval_prompts": ("eval_prompts", "eval_generate_interval", "eval_max_new_tokens")},
}
"""By section of version 1 and section of version 2: the keys that moved from one to the other."""

Move = tuple[str, str, str]
"""Old section, new section, key."""


def migrate_config(config: Mapping[str, Any], name: str) -> tuple[dict[str, Any], list[Move]]:
    """Return a config in the sections of today, and what had to be moved for that.

    Args:
        config: sections with their keys, and `format_version` unless release 0.1.0 wrote it.
        name: of the file, for errors.

    Raises:
        ConfigError: a version of a later release, or no version at all; a key in its old section and in its new one.
    """
    version = config.get(VERSION_KEY, _FIRST_VERSION)
    if type(version) is not int or not _FIRST_VERSION <= version <= FORMAT_VERSION:
        raise ConfigError(
            f"{name}: {VERSION_KEY}={version!r}; this release reads {_FIRST_VERSION} to {FORMAT_VERSION}: use the "
            "release that wrote it, or a later one"
        )
    sections = {
        section: dict(keys) if isinstance(keys, Mapping) else keys
        for section, keys in config.items()
        if section != VERSION_KEY
    }
    return sections, _move(sections, _MOVED_IN_2, name) if version < 2 else []


def _move(
    sections: dict[str, Any], moved: Mapping[str, Mapping[str, tuple[str, ...]]], name: str
) -> list[Move]:
    """Move keys in place, and return which; a section that is left empty is removed."""
    moves: list[Move] = []
    for old, targets in moved.items():
        given = sections.get(old)
        if not isinstance(given, dict):
            continue
        for new, keys in targets.items():
            for key in [key for key in keys if key in given]:
                target = sections.setdefault(new, {})
                if not isinstance(target, dict) or key in target:
                    raise ConfigError(
                        f"{name}: {key} stands in [{old}] and in [{new}]; keep the one in [{new}]"
                    )
                target[key] = given.pop(key)
                moves.append((old, new, key))
        if not given and any(old == move[0] for move in moves):
            del sections[old]
    return moves


def describe_moves(moves: list[Move]) -> str:
    """Say how to rewrite a recipe: which keys to move from which section to which."""
    parts = [
        f"{', '.join(key for *_, key in group)} from [{old}] to [{new}]"
        for (old, new), group in groupby(moves, key=lambda move: move[:2])
    ]
    return "; ".join(parts)
