"""What an adapter's config promises for one model: which modules are adapted and replaced, with which rank and scale.

peft's own functions decide which module a name, a pattern or an index means, so that they mean here what they mean
there. peft compares them with the modules of a model; here with the names that the model's family gives to them.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families import find_family
from ascendspeed_core.weights.adapters.hugging_face import TIED_HEAD, ModuleKind, hugging_face_modules
from ascendspeed_core.weights.source import CheckpointError

if TYPE_CHECKING:
    from peft import LoraConfig

HEAD_MODULE = TIED_HEAD.removesuffix(".weight")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class PromisedLayer:
    """A module with an adapter.

    Attributes:
        rank: rows of A and columns of B.
        scale: factor of B A.
        is_embedding: A and B are of the transpose of its weight.
    """

    rank: int
    scale: float
    is_embedding: bool = False


@dataclass(frozen=True)
class Promise:
    """What an adapter must hold, by modules of the Hugging Face model.

    Attributes:
        layers: modules with an adapter.
        saved: modules that are replaced with all that is in them.
        keeps_tie: a tied head does what the embedding does; the adapter holds it for both.
        remarks: what the config says without effect, each one line.
    """

    layers: Mapping[str, PromisedLayer]
    saved: frozenset[str]
    keeps_tie: bool
    remarks: tuple[str, ...]


def promise_of(config: "LoraConfig", model: ModelConfig, path: Path) -> Promise:
    """Find what a config means for a model.

    Args:
        config: as peft read it; its `target_modules` is completed.
        model: the architecture.
        path: of the config, for messages.

    Raises:
        CheckpointError: it means nothing in this model, or something that is no linear layer.
    """
    modules = hugging_face_modules(model)
    try:
        return _promise_of(config, model, modules, path)
    except re.error as error:
        raise CheckpointError(
            f"{path}: a pattern is no regular expression ({error}: {error.pattern!r}); correct it"
        ) from None


def _promise_of(
    config: "LoraConfig", model: ModelConfig, modules: Mapping[str, ModuleKind], path: Path
) -> Promise:
    from peft.tuners.tuners_utils import check_target_module_exists

    _resolve_targets(config, model, modules, path)
    keeps_tie = config.ensure_weight_tying and model.tie_word_embeddings and _keep_tie(config, modules)
    saved = _saved_modules(config, modules)
    layers: dict[str, PromisedLayer] = {}
    for name, kind in modules.items():
        if check_target_module_exists(config, name):
            if kind not in ("linear", "embedding"):
                what = "packs or transposes others" if kind == "fused" else "is no linear layer"
                raise CheckpointError(
                    f"{path}: target_modules means {name}, which {what}; name linear layers, or merge it with peft"
                )
            layers[name] = _layer(config, name, kind)
    if keeps_tie:
        _add_head(config, modules, layers, saved, path)
    if not layers:
        raise CheckpointError(
            f"{path}: target_modules={_shown(config.target_modules)} means no module of this model "
            f"({model.family}) that other fields leave in; the adapter is of another model"
        )
    _check_saved(saved, layers, modules, path)
    return Promise(layers, frozenset(saved), keeps_tie, tuple(_remarks(config, modules, layers, path)))


def _resolve_targets(
    config: "LoraConfig", model: ModelConfig, modules: Mapping[str, ModuleKind], path: Path
) -> None:
    """Put names in place of `all-linear` and of nothing, as peft does when it sees the model."""
    targets = config.target_modules
    if targets is None:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

        model_type = find_family(model.family).model_type
        if model_type not in DEFAULTS:
            raise CheckpointError(
                f"{path} does not say target_modules, and peft knows none for {model_type}; name them there"
            )
        found = DEFAULTS[model_type]
        config.target_modules = found if isinstance(found, str) else set(found)
    elif isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        fused = sorted(name for name, kind in modules.items() if kind == "fused")
        if fused:
            raise CheckpointError(
                f"{path}: target_modules={targets!r} is not clear where {fused[0]} packs or transposes others; name "
                "the linear layers there"
            )
        config.target_modules = {
            name for name, kind in modules.items() if kind == "linear" and name != HEAD_MODULE
        }


def _keep_tie(config: "LoraConfig", modules: Mapping[str, ModuleKind]) -> bool:
    """Apply `ensure_weight_tying` as peft does: the embedding is adapted or replaced, and a tied head follows it.

    Returns:
        Whether one of the two is named, so that there is something to follow.
    """
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    embedding = _embedding_of(modules)
    saved, targets = config.modules_to_save or [], config.target_modules or ()
    if any(word.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for word in saved):
        config.modules_to_save = [*_without_head(saved), embedding]
    elif isinstance(targets, str):
        if not any(re.fullmatch(targets, name) for name in EMBEDDING_LAYER_NAMES):
            return False
        config.target_modules = rf"(?:{targets}|^{re.escape(embedding)}$)"
    elif any(word.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for word in targets):
        config.target_modules = {*_without_head(targets), embedding}
    else:
        return False
    return True


def _embedding_of(modules: Mapping[str, ModuleKind]) -> str:
    return next(name for name, kind in modules.items() if kind == "embedding")


def _add_head(
    config: "LoraConfig",
    modules: Mapping[str, ModuleKind],
    layers: dict[str, PromisedLayer],
    saved: list[str],
    path: Path,
) -> None:
    """Let a tied head do what the embedding does: it has the same A and B, swapped, or the same copy."""
    embedding = _embedding_of(modules)
    if embedding in saved:
        saved.append(HEAD_MODULE)
        return
    source, own = layers.get(embedding), _layer(config, HEAD_MODULE, "linear")
    if source is None or source.scale != own.scale:
        raise CheckpointError(
            f"{path}: ensure_weight_tying is given, and other fields leave the embedding out or scale it otherwise "
            "than the head; merge it with peft"
        )
    layers[HEAD_MODULE] = PromisedLayer(source.rank, own.scale)


def _without_head(words: Collection[str]) -> list[str]:
    return [word for word in words if not re.match(rf"(^|.*\.){word}($|\..*)", HEAD_MODULE)]


def _layer(config: "LoraConfig", name: str, kind: ModuleKind) -> PromisedLayer:
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    rank = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return PromisedLayer(rank, alpha / (sqrt(rank) if config.use_rslora else rank), kind == "embedding")


def _saved_modules(config: "LoraConfig", modules: Mapping[str, ModuleKind]) -> list[str]:
    """Return the modules whose names end as peft's `modules_to_save` says, dots or not."""
    words = tuple(config.modules_to_save or ())
    return [name for name in modules if name.endswith(words)] if words else []


def _check_saved(
    saved: Collection[str],
    layers: Mapping[str, PromisedLayer],
    modules: Mapping[str, ModuleKind],
    path: Path,
) -> None:
    """Refuse what peft wraps twice, and what cannot be replaced here."""
    for module in saved:
        inside = [name for name in modules if name == module or name.startswith(f"{module}.")]
        twice = [name for name in inside if name in layers or (name != module and name in saved)]
        if twice:
            raise CheckpointError(
                f"{path}: modules_to_save means {module}, and {twice[0]} in it is adapted or replaced once more; leave "
                "it out of one"
            )
        fused = [name for name in inside if modules[name] == "fused"]
        if fused:
            raise CheckpointError(
                f"{path}: modules_to_save means {fused[0]}, which packs or transposes others; merge it with peft"
            )


def _remarks(
    config: "LoraConfig", modules: Mapping[str, ModuleKind], layers: Mapping[str, PromisedLayer], path: Path
) -> list[str]:
    """Say which words mean nothing in this model."""

    def ends(word: str) -> bool:
        return any(name == word or name.endswith(f".{word}") for name in modules)

    def matches(pattern: str) -> bool:
        return any(re.match(rf"(.*\.)?({pattern})$", name) for name in layers)

    def fullmatches(pattern: str) -> bool:
        return any(re.fullmatch(pattern, name) for name in modules)

    without: dict[str, list[str]] = {}
    for field in ("target_modules", "exclude_modules"):
        words = getattr(config, field) or ()
        if isinstance(words, str):
            without[field] = [] if fullmatches(words) else [words]
        else:
            without[field] = [word for word in words if not ends(word)]
    saved = config.modules_to_save or ()
    without["modules_to_save"] = [word for word in saved if not any(name.endswith(word) for name in modules)]
    for field in ("rank_pattern", "alpha_pattern"):
        without[field] = [pattern for pattern in getattr(config, field) or {} if not matches(pattern)]
    return [
        f"{path}: {field} names {', '.join(sorted(words))}, which no module of this model is; without effect"
        for field, words in without.items()
        if words
    ]


def _shown(targets: "str | Collection[str] | None") -> str:
    return repr(targets if targets is None or isinstance(targets, str) else sorted(targets))
