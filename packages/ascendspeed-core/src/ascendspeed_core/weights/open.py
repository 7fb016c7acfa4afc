"""Recognise what a path holds."""

from pathlib import Path

from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.models.families import family_of_hugging_face
from ascendspeed_core.weights.huggingface import HuggingFaceSource, read_json
from ascendspeed_core.weights.initial import InitialWeights
from ascendspeed_core.weights.native import DESCRIPTION, TRACKER, NativeSource
from ascendspeed_core.weights.source import CheckpointError, WeightSource
from ascendspeed_data.files import INCOMPLETE

RECOGNISED = {
    "native": f"a run's folder with {TRACKER}, or an iter_* folder with {DESCRIPTION}",
    "huggingface": "a folder with config.json and model.safetensors or pytorch_model.bin",
}


def kind_of(path: Path) -> str:
    """Return the kind of checkpoint at `path`; only names of files are looked at.

    Raises:
        CheckpointError: the path does not exist, or is nothing that is recognised.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; check --load")
    if path.name.startswith("iter_") and path.name.endswith(INCOMPLETE):
        raise CheckpointError(f"{path} was not completed; use an earlier checkpoint of {path.parent}")
    if (path / TRACKER).is_file() or (path / DESCRIPTION).is_file():
        return "native"
    if (path / "config.json").is_file():
        return "huggingface"
    known = "; ".join(f"{kind}: {what}" for kind, what in RECOGNISED.items())
    raise CheckpointError(f"{path} is no checkpoint that is recognised ({known})")


def open_source(source: ModelSourceConfig, seed: int) -> WeightSource:
    """Open what a command was told to start from: a checkpoint, or random weights of a config.

    Raises:
        CheckpointError: nothing there, not recognised, incomplete, or of an unsupported architecture.
    """
    if source.load is not None:
        return open_weights(source.load)
    path = source.model_config_file
    assert path is not None
    hf_config = read_json(path)
    return InitialWeights(family_of_hugging_face(hf_config, str(path)).read_config(hf_config), seed)


def open_weights(path: Path) -> HuggingFaceSource | NativeSource:
    """Open the checkpoint at `path`, whatever kind it is; weights are read later, by slice.

    Raises:
        CheckpointError: nothing there, not recognised, incomplete, or of an unsupported architecture.
    """
    return NativeSource(path) if kind_of(path) == "native" else HuggingFaceSource(path)
