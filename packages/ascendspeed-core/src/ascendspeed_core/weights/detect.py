"""Recognise what a path holds."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.models.families import family_of_hugging_face
from ascendspeed_core.weights.external.deepspeed import LATEST, DeepSpeedPipeSource
from ascendspeed_core.weights.external.mp_rank import ShardedSource
from ascendspeed_core.weights.external.mp_rank import iteration_folder as foreign_folder
from ascendspeed_core.weights.external.torch_dist import BACKEND, TorchDistSource
from ascendspeed_core.weights.huggingface.source import HuggingFaceSource, read_json
from ascendspeed_core.weights.native.source import DESCRIPTION, TRACKER, NativeSource
from ascendspeed_core.weights.random_init import InitialWeights
from ascendspeed_core.weights.source import CheckpointError, Kind, WeightSource
from ascendspeed_data.errors import ConfigError, did_you_mean
from ascendspeed_data.files import INCOMPLETE

RECOGNISED = {
    "native": f"a run's folder with {TRACKER}, or an iter_* folder with {DESCRIPTION}",
    "huggingface": "a folder with config.json and model.safetensors or pytorch_model.bin",
    "ascendspeed, megatron": "a folder with mp_rank_* folders, or with a tracker that names one",
    "torch_dist": f"a folder with {BACKEND}, or with a tracker that names one",
    "deepspeed": f"a folder with layer_* files, or with {LATEST} that names one",
}


def kind_of(path: Path) -> Kind:
    """Return the kind of checkpoint at `path`; only names of files are looked at, but for `mp_rank_*` folders.

    Raises:
        CheckpointError: the path does not exist, or is nothing that is recognised.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; check --load")
    if path.name.endswith(INCOMPLETE):
        raise CheckpointError(f"{path} was not completed; use an earlier checkpoint of {path.parent}")
    if (path / DESCRIPTION).is_file():
        return "native"
    if (path / TRACKER).is_file():
        return _kind_of_run(path)
    if (path / BACKEND).is_file():
        return "torch_dist"
    if any(path.glob("mp_rank_*")):
        return ShardedSource.kind_in(path)
    if (path / LATEST).is_file() or any(path.glob("layer_*-model_*-model_states.pt")):
        return "deepspeed"
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


def open_weights(
    path: Path,
    kind: Kind | None = None,
    config: ModelConfig | None = None,
    vocab_size: int | None = None,
    otherwise: Callable[[], ModelConfig | None] = lambda: None,
) -> WeightSource:
    """Open the checkpoint at `path`, whatever kind it is; weights are read later, by slice.

    Args:
        path: folder of the checkpoint.
        kind: what it is, where it is not to be recognised.
        config: the architecture, for checkpoints of other systems that do not say it.
        vocab_size: rows of the embedding that are not filling, for those that do not say it.
        otherwise: asked for the architecture when nothing else says it.

    Raises:
        ConfigError: an unknown kind.
        CheckpointError: nothing there, not recognised, incomplete, or of an unsupported architecture.
    """
    if kind is not None and kind not in get_args(Kind):
        raise ConfigError(
            f"from={kind} is unknown; known: {', '.join(get_args(Kind))}{did_you_mean(kind, get_args(Kind))}"
        )
    found = kind_of(path) if kind is None else kind
    if found == "native":
        return NativeSource(path)
    if found == "huggingface":
        return HuggingFaceSource(path)
    if found == "torch_dist":
        return TorchDistSource(path, config, vocab_size)
    if found == "deepspeed":
        return DeepSpeedPipeSource(path, config)
    source = ShardedSource(path, config, vocab_size, otherwise)
    if source.kind != found:
        raise CheckpointError(f"{path} is of kind {source.kind}, not {found}; leave --from out")
    return source


def _kind_of_run(path: Path) -> Kind:
    """Tell apart the kinds that have a tracker."""
    text = (path / TRACKER).read_text(encoding="utf-8").strip()
    if text == "release":
        return kind_of(foreign_folder(path))
    if text.isdecimal():
        folder = path / f"iter_{int(text):07d}"
        if (folder / BACKEND).is_file() or any(folder.glob("mp_rank_*")):
            return kind_of(foreign_folder(path))
    return "native"
