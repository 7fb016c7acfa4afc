"""Megatron-LM's arguments, pickled beside the weights: which architecture they describe, and whether it fits."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.launch import announce
from ascendspeed_core.weights.external.config_of_arguments import (
    MUST_BE,
    CheckpointFacts,
    config_of_arguments,
)
from ascendspeed_core.weights.external.sidecar import Sidecar
from ascendspeed_core.weights.files.torch_files import InertObject, TorchFile, UnknownObject
from ascendspeed_core.weights.huggingface.config import generation_ids, read_model_config
from ascendspeed_core.weights.shard_layout import ShardLayout
from ascendspeed_core.weights.source import CheckpointError, UnknownModelError
from ascendspeed_data.command_line import log

_COMPARED = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "ffn_hidden_size",
    "kv_channels": "head_dim",
}

_SAID = {"norm_epsilon": "norm_epsilon", "layernorm_epsilon": "norm_epsilon", "rotary_base": "rotary_base"}
"""Arguments that scripts leave at their defaults; a line says where a given config differs from them."""

_WITHOUT_EFFECT = frozenset(
    (
        "family",
        "bos_token_id",
        "eos_token_ids",
        "pad_token_id",
        "initializer_range",
        "max_position_embeddings",
    )
)
"""Fields of a config that change no logit."""


_NEEDED = ("num_attention_heads", "hidden_size", "ffn_hidden_size")
"""Arguments without which the others describe no model."""


def resolve_config(
    facts: CheckpointFacts,
    sidecar: Sidecar | None,
    arguments: Any,
    given: ModelConfig | None,
    vocab_size: int | None,
    fallback_config: Callable[[], ModelConfig | None] = lambda: None,
) -> ModelConfig:
    """Return the architecture: from the sidecar, the given config, a config.json, or the arguments.

    Raises:
        CheckpointError: nothing describes it, or what describes it contradicts the weights.
    """
    recorded = sidecar.model if sidecar is not None else config_beside(facts.folder)
    if recorded is not None and given is not None:
        check_given(facts.folder, recorded, given)
    config = recorded if sidecar is not None else given or recorded
    if sidecar is None and config is not None and isinstance(arguments, Namespace):
        _say_what_config_decides(facts, arguments, config)
    if config is None and any(not isinstance(getattr(arguments, name, None), int) for name in _NEEDED):
        config = fallback_config()
    if config is None and not isinstance(arguments, Namespace):
        held = "no arguments" if arguments is None else f"arguments that are not read, {_class(arguments)}"
        raise UnknownModelError(
            f"{facts.folder} does not include its architecture (it holds {held}); put the model's config.json "
            "into it, or name it with --model-config"
        )
    if config is None:
        config = config_of_arguments(facts, arguments, vocab_size).model_copy(update=_ids(facts.folder))
    elif vocab_size is not None and vocab_size != config.vocab_size:
        raise CheckpointError(
            f"{facts.folder}: orig_vocab_size={vocab_size} contradicts the model's config, which says "
            f"{config.vocab_size}; leave --orig-vocab-size out, or correct the config"
        )
    if isinstance(arguments, Namespace):
        _compare_arguments(facts, arguments, config)
    if config.num_layers != facts.num_layers:
        raise CheckpointError(
            f"{facts.folder} holds {facts.num_layers} layers, the model has {config.num_layers}; files are missing or "
            "of another checkpoint"
        )
    if config.vocab_size > facts.vocabulary_rows:
        raise CheckpointError(
            f"{facts.folder}: its embedding has {facts.vocabulary_rows:,} rows, fewer than "
            f"vocab_size={config.vocab_size:,}"
        )
    return config


def _compare_arguments(facts: CheckpointFacts, arguments: Namespace, config: ModelConfig) -> None:
    """Raise where arguments contradict the config; say where they may have been left at a default."""
    compared = dict(_COMPARED)
    if getattr(arguments, "group_query_attention", False) is True:
        compared["num_query_groups"] = "num_key_value_heads"
    for theirs, ours in compared.items():
        said, known = getattr(arguments, theirs, None), getattr(config, ours)
        if isinstance(said, int) and said != known:
            raise CheckpointError(
                f"{facts.folder}: its arguments say {theirs}={said}, the model's config {known}; "
                "name the right config or another checkpoint"
            )
    for theirs, ours in _SAID.items():
        said, known = getattr(arguments, theirs, None), getattr(config, ours)
        if isinstance(said, int | float) and said != known:
            announce(f"{facts.folder}: its arguments say {theirs}={said:g}, used is the config's {known:g}")


def _say_what_config_decides(facts: CheckpointFacts, arguments: Namespace, config: ModelConfig) -> None:
    """Say where arguments that no tensor shows ask for something that the config may say otherwise."""
    others = {name: getattr(arguments, name, allowed[0]) for name, allowed in MUST_BE.items()}
    said = [f"{name}={value!r}" for name, value in others.items() if value not in MUST_BE[name]]
    stretch = getattr(arguments, "rotary_seq_len_interpolation_factor", None)
    if stretch not in (None, 1) and config.rotary_scaling is None:
        said.append(f"rotary_seq_len_interpolation_factor={stretch!r}")
    if said:
        announce(f"{facts.folder}: its arguments say {', '.join(said)}; used is what the model's config says")


def read_arguments(file: TorchFile) -> Any:
    """Return the arguments that lie beside the weights as a `Namespace`, if they can be read as one.

    Dictionaries and `SimpleNamespace`s are arguments too. What cannot be read is returned as it is, and `None` means
    that there are none. Values that are objects of unknown packages stay unread, which a line says.
    """
    content = file.content
    found = content.get("args") if isinstance(content, dict) else None
    if isinstance(found, InertObject) and isinstance(getattr(found, "state", None), dict):
        found = found.state
    if isinstance(found, dict) and all(isinstance(name, str) for name in found):
        found = Namespace(**found)
    if isinstance(found, Namespace):
        unread = sorted({_class(value) for value in vars(found).values() if isinstance(value, UnknownObject)})
        if unread:
            announce(f"{file.path}: of its arguments not read: objects of {', '.join(unread)}")
    return found


def _class(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__name__}"


def check_given(folder: Path, recorded: ModelConfig, given: ModelConfig) -> None:
    """Raise `CheckpointError` when a config that a user names is not that of the model that was written."""
    ours, theirs = recorded.model_dump(), given.model_dump()
    different = [
        f"{name}={theirs[name]!r} (recorded: {ours[name]!r})"
        for name in ours
        if ours[name] != theirs[name] and name not in _WITHOUT_EFFECT
    ]
    if different:
        raise CheckpointError(
            f"{folder}: the config given says {', '.join(different)}; leave --model-config out, the checkpoint "
            "records its own"
        )


def check_experts(folder: Path, arguments: Any, config: ModelConfig, layout: ShardLayout) -> None:
    """Check what arguments and files say of experts against the config.

    Raises:
        CheckpointError: they contradict it, or experts are cut otherwise than the rest.
    """
    experts = config.experts
    if experts is None:
        if layout.ep > 1:
            raise CheckpointError(
                f"{folder} has files of {layout.ep} expert-parallel ranks, but the model's config has no experts; "
                "name the right config"
            )
        return
    if experts.count % layout.ep:
        raise CheckpointError(
            f"{folder} has files of {layout.ep} expert-parallel ranks, which do not divide the {experts.count} experts "
            "of the model's config; name the right config or another checkpoint"
        )
    cut = getattr(arguments, "expert_tensor_parallel_size", None)
    if isinstance(cut, int) and cut != layout.tp:
        raise CheckpointError(
            f"{folder}: its arguments say expert_tensor_parallel_size={cut} with "
            f"tensor_model_parallel_size={layout.tp}; experts that are cut otherwise than the rest are not read; "
            "save it again with both alike, or as torch_dist"
        )
    of_experts = {"num_experts": experts.count, "moe_router_topk": experts.per_token}
    for name, known in of_experts.items():
        said = getattr(arguments, name, None)
        if isinstance(said, int) and said != known:
            raise CheckpointError(
                f"{folder}: its arguments say {name}={said}, the model's config {known}; "
                "name the right config or another checkpoint"
            )


def check_arguments(
    file: TorchFile, sidecar: Sidecar | None, layout: ShardLayout, rank: tuple[int, int, int]
) -> None:
    """Check that a file is that of its rank, as far as it says.

    Raises:
        CheckpointError: it says another rank, layout or checkpoint.
    """
    content = file.content
    mine = content.get("ascendspeed")
    tp_rank, stage, ep_rank = rank
    of_experts = f", expert-parallel rank {ep_rank}," if layout.ep > 1 else ""
    if sidecar is not None and mine != {**layout.record(*rank), "checkpoint": sidecar.checkpoint}:
        raise CheckpointError(
            f"{file.path} is not tensor rank {tp_rank} of stage {stage}{of_experts} of this checkpoint, it says "
            f"{mine}; files were swapped or mixed, copy the folder again"
        )
    arguments = content.get("args")
    if not isinstance(arguments, Namespace):
        return
    sizes = {"tensor_model_parallel_size": layout.tp, "pipeline_model_parallel_size": layout.pp}
    if layout.ep > 1 or getattr(arguments, "num_experts", None):
        sizes["expert_model_parallel_size"] = layout.ep
    for name, found in sizes.items():
        said = getattr(arguments, name, found)
        if said != found:
            raise CheckpointError(
                f"{file.path}: its arguments say {name}={said}, but there are files for {found}; files are missing or "
                "of another checkpoint"
            )
    process, world = getattr(arguments, "rank", None), getattr(arguments, "world_size", None)
    if mine is None and isinstance(process, int) and isinstance(world, int) and world % layout.pp == 0:
        # Megatron-LM counts ranks with the tensor-parallel one fastest, then that of experts, the stage slowest.
        of_process = (process % layout.tp, process // (world // layout.pp), process // layout.tp % layout.ep)
        if of_process != rank:
            raise CheckpointError(
                f"{file.path} was written by process {process} of {world}, which is not tensor rank {tp_rank} of stage "
                f"{stage}{of_experts.rstrip(',')}; files were swapped, copy the folder again"
            )


def config_beside(folder: Path) -> ModelConfig | None:
    """Return the architecture from a config.json in the folder, or in its parent, if there is one."""
    for path in (folder / "config.json", folder.parent / "config.json"):
        if path.is_file():
            log(f"{folder}: architecture taken from {path}")
            return read_model_config(path)
    return None


def _ids(folder: Path) -> dict[str, Any]:
    """Return the ids of a generation_config.json beside the weights, which arguments do not include."""
    found = {**generation_ids(folder.parent), **generation_ids(folder)}
    end = found.get("eos_token_id")
    ids = tuple(end) if isinstance(end, list) else () if end is None else (int(end),)
    return {"eos_token_ids": ids, "bos_token_id": found.get("bos_token_id")}
