"""Read the configs of a Hugging Face folder: `config.json` and `generation_config.json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families import family_of_hugging_face
from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.published import published_names, published_size
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.source import CheckpointError
from ascendspeed_data.errors import did_you_mean


def read_model_config(path: Path) -> ModelConfig:
    """Return the architecture that a `config.json` describes, or that of a published size by its name.

    Raises:
        CheckpointError: the file cannot be read.
        AscendSpeedError: no family supports the architecture, or an option of it.
    """
    family, hf_config = _family_and_config(path)
    return family.read_config(hf_config, str(path))


def dropout_of(path: Path) -> dict[str, float]:
    """Return what a `config.json` would have training drop, by the name of the option that says it here.

    Raises:
        CheckpointError: the file cannot be read.
        AscendSpeedError: no family supports the architecture, or a value is no share.
    """
    family, hf_config = _family_and_config(path)
    return family.dropout_of(hf_config, str(path))


def _family_and_config(path: Path) -> tuple[Family, Mapping[str, Any]]:
    if path.exists() or path.suffix == ".json" or path.parent != Path():
        hf_config = read_json(path)
        return family_of_hugging_face(hf_config, str(path)), hf_config
    found = published_size(str(path))
    if found is None:
        raise CheckpointError(
            f"model_config_file={path} is neither a file nor a published size"
            f"{did_you_mean(str(path), published_names())}; `asd-core models` lists the sizes"
        )
    return found


class _GenerationConfig(BaseModel):
    """What is read of a `generation_config.json`."""

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


def generation_ids(folder: Path) -> dict[str, Any]:
    """Return the ids that begin and end a text, from `generation_config.json` where there is one."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    values: dict[str, Any] = read_json(path, _GenerationConfig).model_dump()
    return {key: value for key, value in values.items() if value is not None}
