"""Detect what kind of checkpoint a path holds, and open it."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.source import ModelSourceConfig
from ascendspeed_core.launch import announce
from ascendspeed_core.weights.external.deepspeed import LATEST, DeepSpeedPipeSource, step_folder
from ascendspeed_core.weights.external.deepspeed_huggingface import (
    DeepSpeedHuggingFaceSource,
    holds_hugging_face_names,
)
from ascendspeed_core.weights.external.deepspeed_ranks import RANK_FILES, ZERO_3, is_deepspeed_ranks
from ascendspeed_core.weights.external.megatron_args import check_given
from ascendspeed_core.weights.external.mp_rank import MpRankSource, follows_latest
from ascendspeed_core.weights.external.mp_rank import iteration_folder as external_iteration_folder
from ascendspeed_core.weights.external.torch_dist import BACKEND, TorchDistSource
from ascendspeed_core.weights.files.json_file import read_iteration
from ascendspeed_core.weights.huggingface.config import read_model_config
from ascendspeed_core.weights.huggingface.files import ADAPTER, has_weight_files, what_weights
from ascendspeed_core.weights.huggingface.source import HuggingFaceSource
from ascendspeed_core.weights.native.source import DESCRIPTION, TRACKER, NativeSource
from ascendspeed_core.weights.random_init import InitialWeights
from ascendspeed_core.weights.source import CheckpointError, Kind, WeightSource
from ascendspeed_data.errors import ConfigError, did_you_mean, not_downloaded
from ascendspeed_data.files import INCOMPLETE

KNOWN_KINDS = {
    "native": f"a run's folder with {TRACKER}, or an iter_* folder with {DESCRIPTION}",
    "huggingface": "a folder with config.json and model.safetensors or pytorch_model.bin",
    "ascendspeed, megatron": "a folder with mp_rank_* folders, or with a tracker that names one",
    "torch_dist": f"a folder with {BACKEND}, or with a tracker that names one",
    "deepspeed": f"a folder with layer_* or mp_rank_*_model_states.pt files, or with {LATEST} that names one",
}

_STATE_BESIDE = (LATEST, RANK_FILES, ZERO_3, "pytorch_model_fsdp*")
"""Patterns of what trainers leave beside the weights of a Hugging Face folder."""
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
"""Weights of an adapter of peft."""


def detect_kind(path: Path) -> Kind:
    """Return the kind of checkpoint at `path`, from names of files alone, except for `mp_rank_*` folders.

    Raises:
        CheckpointError: the path does not exist, or holds no checkpoint of a known kind.
    """
    if not path.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; {not_downloaded(path) or 'check --load'}")
    if path.name.endswith(INCOMPLETE):
        raise CheckpointError(f"{path} was not completed; use an earlier checkpoint of {path.parent}")
    if path.is_file():
        raise CheckpointError(f"checkpoint {path} is a file{_what_file(path)}; name the folder with --load")
    if (path / DESCRIPTION).is_file():
        return "native"
    if _holds_hugging_face(path) and ((path / LATEST).is_file() or _is_deepspeed(path)):
        return "huggingface"
    if follows_latest(path) and _is_deepspeed(step_folder(path)):
        return "deepspeed"
    if (path / TRACKER).is_file():
        return _detect_kind_of_run(path)
    if (path / BACKEND).is_file():
        return "torch_dist"
    if (path / LATEST).is_file() or _is_deepspeed(path):
        return "deepspeed"
    if any(path.glob("mp_rank_*")):
        return MpRankSource.kind_in(path)
    if (path / "config.json").is_file():
        return "huggingface"
    if has_weight_files(path):
        raise CheckpointError(
            f"{path} holds weights but no config.json; put the config.json of the model into it"
        )
    others = what_weights(path)
    if others is not None:
        raise CheckpointError(f"{path} has no weights that are read, only {others}")
    if (path / "adapter_config.json").is_file():
        raise CheckpointError(f"{path} holds {ADAPTER}")
    known = "; ".join(f"{kind}: {what}" for kind, what in KNOWN_KINDS.items())
    raise CheckpointError(
        f"{path} is not a checkpoint of a known kind ({known}); {_inner_checkpoint(path) or 'check --load'}"
    )


def open_source(source: ModelSourceConfig, seed: int, size: str | None = None) -> WeightSource:
    """Open the checkpoint that a command starts from, or random weights of its config.

    Args:
        source: the options `--load` and `--model-config`.
        seed: of random weights.
        size: published size that the checkpoint is to have, if a recipe says it.

    Raises:
        CheckpointError: there is no checkpoint, or it is of no known kind, incomplete or of an unsupported
            architecture.
    """
    path = source.model_config_file
    if source.load is None:
        assert path is not None
        return InitialWeights(read_model_config(path), seed)
    if path is not None or source.orig_vocab_size is not None:
        kind = detect_kind(source.load)
        if kind in ("native", "huggingface"):
            flag = "--model-config" if path is not None else "--orig-vocab-size"
            raise ConfigError(
                f"{flag} was given with --load {source.load}, a checkpoint of kind {kind}, which says itself what "
                f"model it is; leave {flag} out"
            )
    config = read_model_config(path) if path is not None else None
    meant = None if size is None else read_model_config(Path(size))
    found = open_weights(
        source.load, config=config, vocab_size=source.orig_vocab_size, fallback_config=lambda: meant
    )
    if meant is not None and config is None:
        _check_size(source.load, found.config, meant, size)
    return found


_OF_A_SIZE = (
    "family",
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
)
"""Fields that a published size fixes; a vocabulary may have grown, a rotary base may have been changed."""


def _check_size(path: Path, found: ModelConfig, meant: ModelConfig, size: str | None) -> None:
    """Refuse a checkpoint of another size than a recipe is for."""
    other = [name for name in _OF_A_SIZE if getattr(found, name) != getattr(meant, name)]
    if other:
        lines = (f"{name}={getattr(found, name)}, not {getattr(meant, name)}" for name in other)
        raise CheckpointError(
            f"{path} is another model than {size}, which the recipe is for: {', '.join(lines)}; take the recipe of "
            "that model, or write this one down (asd-core recipes NAME) and change it"
        )


def open_weights(
    path: Path,
    kind: Kind | None = None,
    config: ModelConfig | None = None,
    vocab_size: int | None = None,
    fallback_config: Callable[[], ModelConfig | None] = lambda: None,
) -> WeightSource:
    """Open the checkpoint at `path`, of any kind; weights are read later, by slice.

    Args:
        path: folder of the checkpoint.
        kind: its kind; by default it is detected.
        config: the architecture, for external checkpoints that do not include it; of others it is compared.
        vocab_size: vocabulary size without padding, for external checkpoints that do not record it.
        fallback_config: called for the architecture when neither the checkpoint nor `config` gives it.

    Raises:
        ConfigError: an unknown kind.
        CheckpointError: there is no checkpoint, or it is of no known kind, incomplete or of an unsupported
            architecture.
    """
    if kind is not None and kind not in get_args(Kind):
        raise ConfigError(
            f"from={kind} is unknown; known: {', '.join(get_args(Kind))}{did_you_mean(kind, get_args(Kind))}"
        )
    found = detect_kind(path) if kind is None else kind
    if found == "huggingface":
        _name_state_beside(path)
    source = _open_kind(path, found, config, vocab_size, fallback_config)
    if source.kind != found:
        raise CheckpointError(f"{path} is a checkpoint of kind {source.kind}, not {found}; leave --from out")
    if config is not None and found in ("native", "huggingface"):
        check_given(path, source.config, config)
    if vocab_size not in (None, source.config.vocab_size):
        raise CheckpointError(
            f"{path}: orig_vocab_size={vocab_size} contradicts the checkpoint, which has vocab_size="
            f"{source.config.vocab_size}; leave --orig-vocab-size out"
        )
    return source


def _open_kind(
    path: Path,
    kind: Kind,
    config: ModelConfig | None,
    vocab_size: int | None,
    fallback_config: Callable[[], ModelConfig | None],
) -> WeightSource:
    if kind == "native":
        return NativeSource(path)
    if kind == "huggingface":
        return HuggingFaceSource(path)
    if kind == "torch_dist":
        return TorchDistSource(path, config, vocab_size, fallback_config)
    if kind == "deepspeed":
        folder = step_folder(path)
        if not is_deepspeed_ranks(folder):
            return DeepSpeedPipeSource(path, config, fallback_config)
        if holds_hugging_face_names(folder):
            return DeepSpeedHuggingFaceSource(path, folder, config)
    return MpRankSource(path, config, vocab_size, fallback_config)


def _holds_hugging_face(path: Path) -> bool:
    """Tell whether a folder is one of Hugging Face, whatever else lies in it."""
    return (path / "config.json").is_file() and has_weight_files(path)


def _name_state_beside(path: Path) -> None:
    """Say of a Hugging Face folder that a trainer wrote which state of its run, or adapter, is left unread."""
    others = [child.name for child in path.iterdir() if child.is_dir() and _is_deepspeed(child)]
    others += [child.name for pattern in _STATE_BESIDE for child in path.glob(pattern)]
    if others:
        announce(
            f"{path}: read are the Hugging Face weights in it; not read: {', '.join(sorted(others))}, the state of a "
            "run of DeepSpeed or FSDP"
        )
    adapters = [name for name in _ADAPTERS if (path / name).is_file()]
    if adapters:
        announce(
            f"{path}: read are the weights of the model; {adapters[0]} beside them, an adapter that transformers would "
            f"apply, counts only with --lora-load {path}"
        )


def _inner_checkpoint(path: Path) -> str | None:
    """Say which folders inside look like checkpoints, where a tracker is missing."""
    found = sorted(
        child.name
        for child in path.iterdir()
        if child.is_dir()
        and (
            any((child / name).is_file() for name in (DESCRIPTION, BACKEND, "config.json"))
            or any(child.glob("mp_rank_*"))
            or _is_deepspeed(child)
        )
    )
    return f"name one of the checkpoints in it: {', '.join(found)}" if found else None


def _is_deepspeed(folder: Path) -> bool:
    """Tell whether a folder holds files of DeepSpeed: one for each layer, or one for each rank."""
    return any(
        any(folder.glob(pattern)) for pattern in ("layer_*-model_*-model_states.pt", RANK_FILES, ZERO_3)
    )


def _what_file(path: Path) -> str:
    """Say of a file of weights in another form what it is."""
    if path.suffix == ".gguf":
        return " in the format GGUF of llama.cpp, which is not read: name the Hugging Face folder that it was made from"
    return ", not a checkpoint's folder"


def _detect_kind_of_run(path: Path) -> Kind:
    """Return the kind of a folder with a tracker."""
    text = read_iteration(path / TRACKER)
    if text == "release":
        return detect_kind(external_iteration_folder(path))
    if text.isdecimal():
        folder = path / f"iter_{int(text):07d}"
        if (folder / BACKEND).is_file() or any(folder.glob("mp_rank_*")):
            return detect_kind(external_iteration_folder(path))
    return "native"
