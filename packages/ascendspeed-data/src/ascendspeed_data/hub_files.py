"""Which files of a repository on a hub stand for a model, a tokenizer, an adapter or records."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from ascendspeed_data.command_line import log
from ascendspeed_data.hub import HubName, Kind, fetch, hub_name
from ascendspeed_data.reading.inputs import format_of

What = Literal["model", "tokenizer", "adapter", "data"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "config.json", "generation_config.json", "chat_template*", "*.jinja",
)  # fmt: skip
"""Files beside a tokenizer that decide what it does."""
WEIGHTS, OLDER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json"), ("*.bin", "*.bin.index.json")
NOT_RECORDS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""JSON files of data sets that hold no records."""


def local_path(given: Path | str, what: What, option: str) -> Path:
    """Return a path as it is, or the folder with the files of a name on a hub, which are fetched if they are missing.

    Args:
        given: path, or name on a hub.
        what: which files are needed.
        option: for messages.

    Raises:
        ConfigError: the library of the hub is not installed.
        AscendSpeedError: the hub has no such name or revision, asks for a token, or cannot be reached.
    """
    name = hub_name(str(given))
    return Path(given) if name is None else _fetch(name, what, option)[0]


def data_paths(given: str, option: str) -> list[str]:
    """Return a path as it is, or those of the files of records that a name on a hub stands for; see `local_path`."""
    name = hub_name(given)
    if name is None:
        return [given]
    folder, files = _fetch(name, "data", option)
    log(f"{option}: {', '.join(files)}")
    return [str(folder / one) for one in files]


def _fetch(name: HubName, what: What, option: str) -> tuple[Path, list[str]]:
    kind: Kind = "dataset" if what == "data" else "model"
    return fetch(name, kind, lambda names: wanted_files(names, what), option, f"file of a {what}")


def wanted_files(names: Sequence[str], what: What) -> list[str]:
    """Return those of a repository's files that are needed.

    Of weights in several formats safetensors are taken; of data sets whose files say so, the training part.
    """
    if what == "data":
        records = [one for one in names if format_of(Path(one)) and Path(one).name not in NOT_RECORDS]
        training = [one for one in records if re.search(r"(?<![a-z])train(?![a-z])", one.lower())]
        return training or records
    patterns = [*TOKENIZER_FILES]
    if what in ("model", "adapter"):
        patterns += ["adapter_config.json"] if what == "adapter" else []
        patterns += _first_there(names, (WEIGHTS, OLDER_WEIGHTS))
    # Files in folders are other formats, or the original release of the same weights.
    own = [one for one in names if "/" not in one or one.startswith("additional_chat_templates/")]
    return [one for one in own if any(fnmatch(Path(one).name, pattern) for pattern in patterns)]


def _first_there(names: Sequence[str], choices: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return next((one for one in choices if any(fnmatch(name, one[0]) for name in names)), choices[0])
