"""Compare the tensors of a Hugging Face folder with what its config says, and name the key that does not fit.

A config that says less or more than the weights would otherwise show as a count of missing tensors.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families import Family, WeightRule
from ascendspeed_core.models.families.base import index_names
from ascendspeed_core.weights.source import CheckpointError, TensorInfo

_SIZES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(embedding|output_head)\.weight", ("vocab_size", "hidden_size")),
    (r"(q_down_proj|q_latent_norm)\.", ("q_latent_dim", "hidden_size")),
    (r"q_up_proj\.", ("num_attention_heads", "head_dim", "q_latent_dim")),
    (r"kv_(down_proj|latent_norm)\.", ("kv_latent_dim", "rotary_dim", "hidden_size")),
    (r"kv_up_proj\.", ("num_attention_heads", "head_dim", "rotary_dim", "value_head_dim", "kv_latent_dim")),
    (r"q_proj\.", ("num_attention_heads", "head_dim", "hidden_size")),
    (r"[kv]_proj\.", ("num_key_value_heads", "head_dim", "hidden_size")),
    (r"o_proj\.", ("hidden_size", "num_attention_heads", "head_dim")),
    (r"\.(router|experts)\.", ("hidden_size",)),
    (r"(gate|up|down)_proj\.", ("ffn_hidden_size", "hidden_size")),
    (r"[qk]_norm\.", ("head_dim",)),
    (r"q_heads_norm\.", ("num_attention_heads", "head_dim")),
    (r"k_heads_norm\.", ("num_key_value_heads", "head_dim")),
    (r"norm\.", ("hidden_size",)),
)
"""By the end of one of our names: fields of `ModelConfig` that make its shape."""


_NOT_OF_A_LANGUAGE_MODEL: tuple[tuple[str, str], ...] = (
    (
        r"v_head\.",
        "is TRL's value head, which no language model has; save the model without it: "
        "model.pretrained_model.save_pretrained(OUT)",
    ),
    (
        r"(score|classifier|qa_outputs)\.",
        "is the head of a classifier, not of a language model; use the model that it was made from",
    ),
    (
        r".*\.lora_([AB]|embedding_[AB])(\.|$)",
        "is an adapter beside the weights of its base; merge it with peft first (merge_and_unload, then "
        "save_pretrained), or give --lora-load the adapter's own folder",
    ),
    (
        r".*\.(base_layer|original_module|modules_to_save)\.",
        "is of a model inside peft; merge its adapter first (merge_and_unload, then save_pretrained)",
    ),
    (
        r".*(vision_tower|vision_model|visual|multi_modal_projector|audio_tower)\.",
        "is of a model that reads more than text; save its language model alone",
    ),
    (
        r"base_model\.model\.",
        "is of a model inside peft; merge its adapter first (merge_and_unload, then save_pretrained)",
    ),
    (
        r"(language_model|llm|model\.model|model\.language_model)\.",
        "is of a model inside another one; save the language model alone",
    ),
    (
        r"pretrained_model\.",
        "is of a model inside TRL; save it without: model.pretrained_model.save_pretrained(OUT)",
    ),
    (
        r"module\.",
        "is a name that a wrapper gives, which only some tensors have; save the model without the wrapper around it",
    ),
)
"""Tensors by the beginning of their names, and what is said of them."""


def check_names(
    folder: Path, family: Family, config: ModelConfig, missing: Sequence[str], extra: Sequence[str]
) -> None:
    """Raise unless the files hold the tensors of the model, and no other ones.

    Args:
        folder: for messages.
        family: whose tables they are read by.
        config: what the config.json says.
        missing: tensors of the model that the files lack, by the family's names.
        extra: tensors of the files that the model does not have.

    Raises:
        CheckpointError: there is one too few or too many; it names the key of the config that would explain it.
    """
    for name in extra:
        said = next((what for pattern, what in _NOT_OF_A_LANGUAGE_MODEL if re.match(pattern, name)), None)
        if said is not None:
            raise CheckpointError(
                f"{folder} holds {len(extra)} tensors that {family.name} does not have: {name} {said}"
            )
    if extra:
        because = _why_extra(family, config, extra[0])
        raise CheckpointError(
            f"{folder} holds {len(extra)} tensors that {family.name} does not have, first {extra[0]}"
            f"{because or '; they would be lost, so it is another model, or name the right config'}"
        )
    if missing:
        because = _why_missing(family, config, missing[0])
        raise CheckpointError(f"{folder} lacks {len(missing)} tensors, first {missing[0]}{because}")


def check_shapes(
    folder: Path,
    family: Family,
    config: ModelConfig,
    found: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    theirs: Mapping[str, str],
) -> None:
    """Raise unless all tensors have the shapes that the config means.

    Args:
        folder: for messages.
        family: whose table the config was read by.
        config: what the config.json says.
        found: shapes in the files, by our names.
        expected: shapes of the model, by our names.
        theirs: their name of each of our tensors.

    Raises:
        CheckpointError: one differs; it names both shapes and the keys of the config that make it.
    """
    for ours, info in found.items():
        if ours in expected and 0 in info.shape:
            raise CheckpointError(
                f"{folder}: {theirs[ours]} has shape {list(info.shape)}, so it is empty, as ZeRO-3 and FSDP leave it "
                "where weights are not gathered before they are saved; save again with "
                "stage3_gather_16bit_weights_on_model_save, or join the shards with DeepSpeed's zero_to_fp32.py"
            )
        if ours in expected and info.shape != expected[ours]:
            fields = next((fields for pattern, fields in _SIZES if re.search(pattern, ours)), ())
            keys = ", ".join(f"{family.key_of(field)}={getattr(config, field)}" for field in fields)
            raise CheckpointError(
                f"{folder}: {theirs[ours]} has shape {list(info.shape)}, config.json makes it {list(expected[ours])}"
                f"{f' by {keys}' if keys else ''}; its config and its weights disagree, correct the config "
                "or copy the folder again"
            )


def _why_extra(family: Family, config: ModelConfig, name: str) -> str | None:
    """Say which key of the config leaves a tensor out that the files hold."""
    for rule in family.rules:
        indices = _indices(rule, name, family)
        if indices is None:
            continue
        layer = indices.get("layer", 0)
        if layer >= config.num_layers:
            return (
                f": config.json says {family.key_of('num_layers')}={config.num_layers}, but there are weights of "
                f"layer {layer}, counted from 0; correct the config"
            )
        if rule.belongs_to(config, indices):
            return None
        if isinstance(rule.when, str):
            return _flag(family, config, rule.when)
    return None


def _why_missing(family: Family, config: ModelConfig, name: str) -> str:
    """Say which key of the config asks for a tensor that the files lack."""
    for rule in family.rules:
        indices = _indices(rule, name, family)
        if indices is None:
            continue
        if rule.tied:
            return (
                f"; if the head is the embedding, set {family.key_of('tie_word_embeddings')} to true in its "
                "config.json, otherwise copy the folder again"
            )
        if isinstance(rule.when, str):
            return _flag(family, config, rule.when)
        layer = indices.get("layer")
        if layer is not None:
            return (
                f" of layer {layer}, counted from 0, though config.json says "
                f"{family.key_of('num_layers')}={config.num_layers}; correct the config or copy the folder again"
            )
    return "; copy the folder again, or correct its config"


def _flag(family: Family, config: ModelConfig, field: str) -> str:
    key = family.key_of(field)
    if field in family.fixed:
        return f", but {family.name} always has {field}={getattr(config, field)}; it is another architecture"
    return f": config.json says {key}={getattr(config, field)}, but its weights say otherwise; correct the config"


def _indices(rule: WeightRule, name: str, family: Family) -> dict[str, int] | None:
    """Return the indices with which a rule's name for them is this one."""
    pattern = re.escape(rule.theirs)
    for index in index_names(rule.theirs):
        pattern = pattern.replace(re.escape(f"{{{index}}}"), rf"(?P<{index}>\d+)", 1)
        pattern = pattern.replace(re.escape(f"{{{index}}}"), rf"(?P={index})")
    prefix = re.escape(family.prefix)
    if prefix and pattern.startswith(prefix):
        pattern = f"({prefix})?{pattern.removeprefix(prefix)}"
    match = re.fullmatch(pattern, name)
    return None if match is None else {key: int(value) for key, value in match.groupdict().items()}
