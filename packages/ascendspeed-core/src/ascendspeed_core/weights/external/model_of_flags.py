"""The architecture that flags of Megatron-LM's training script describe, without any weights."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ascendspeed_core.config.experts import Experts
from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ModelConfig, RotaryScaling
from ascendspeed_core.models.families import find_family
from ascendspeed_core.weights.external.config_of_arguments import CheckpointFacts, config_of_arguments
from ascendspeed_core.weights.shard_layout import shard_layout
from ascendspeed_core.weights.source import TensorInfo
from ascendspeed_data.errors import AscendSpeedError

Flags = Mapping[str, Sequence[str]]
"""Values of each flag by its name: `num_layers`."""


class _Asked(Namespace):
    """Arguments, which remember those that were asked for."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.__dict__["_asked"] = set()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            object.__getattribute__(self, "__dict__")["_asked"].add(name)
        return super().__getattribute__(name)


def model_of_flags(given: Flags, path: Path) -> tuple[dict[str, Any], set[str]]:
    """Return the config.json of a model, and which flags it answers.

    Args:
        given: the flags.
        path: of the script, for messages.

    Raises:
        AscendSpeedError: they describe no model that this program has.
    """
    arguments = _Asked(**{name: _value(values) for name, values in given.items()})
    rotary = "rope" if "use_rotary_position_embeddings" in given else "learned_absolute"
    if getattr(arguments, "position_embedding_type", rotary) == "learned_absolute":
        raise AscendSpeedError(
            f"{path}: position_embedding_type=learned_absolute (Megatron-LM's default) adds a learned vector of "
            "each position, which no family here has; --position-embedding-type rope is another model"
        )
    dense = _Asked(**{**vars(arguments), "num_experts": None, "multi_latent_attention": False})
    config = config_of_arguments(_facts(arguments, path), dense, getattr(arguments, "vocab_size", None))
    changes = _latents(arguments, path) if getattr(arguments, "multi_latent_attention", False) else {}
    if getattr(arguments, "num_experts", None):
        changes |= {"experts": _experts(arguments, config, path)}
    if changes:
        changes["family"] = _family(config, changes)
        config = validate(ModelConfig, config.model_dump() | changes)
    written = find_family(config.family).write_config(config)
    answered = (arguments.__dict__["_asked"] | dense.__dict__["_asked"]) & set(given)
    return written, answered


def _value(values: Sequence[str]) -> Any:
    """Return what a flag says: `True` without a value, a number where it is one."""
    if len(values) != 1:
        return [_value([one]) for one in values] if values else True
    for kind in (int, float):
        try:
            return kind(values[0])
        except ValueError:
            continue
    return values[0]


def _count(arguments: Namespace, name: str, path: Path) -> int:
    value = getattr(arguments, name, None)
    if value is None:
        raise AscendSpeedError(f"{path}: nothing says {name}; add the flag")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AscendSpeedError(f"{path}: {name}={value} is no whole number above zero; correct it")
    return value


def _facts(arguments: Namespace, path: Path) -> CheckpointFacts:
    """Return what the tensors of such a model would say."""
    has_biases = not getattr(arguments, "disable_bias_linear", False)
    is_rms = getattr(arguments, "normalization", "LayerNorm") == "RMSNorm"
    tensors: dict[str, bool] = {
        "input_layernorm.bias": not is_rms,
        "linear_qkv.bias": has_biases or getattr(arguments, "add_qkv_bias", False),
        "linear_proj.bias": has_biases,
        "linear_fc2.bias": has_biases,
        "q_layernorm.weight": getattr(arguments, "qk_layernorm", False)
        and not getattr(arguments, "multi_latent_attention", False),
    }
    first: dict[str, Any] = {
        name: SimpleNamespace(info=TensorInfo((1,), torch.float32))
        for name, is_there in tensors.items()
        if is_there
    }
    layers, rows = (_count(arguments, name, path) for name in ("num_layers", "vocab_size"))
    return CheckpointFacts("megatron", "megatron", path, shard_layout(layers), first, rows)


def _experts(arguments: Namespace, config: ModelConfig, path: Path) -> dict[str, Any]:
    """Return the experts, by the defaults of Megatron-LM."""

    def said(name: str, default: Any) -> Any:
        return getattr(arguments, name, default)

    score = said("moe_router_score_function", "softmax")
    frequency, layers = said("moe_layer_freq", 1), config.num_layers
    if isinstance(frequency, int):
        dense = [layer for layer in range(layers) if layer % frequency]
    else:
        dense = [layer for layer, has in enumerate(_pattern(str(frequency), path)) if not has]
    values = {
        "count": said("num_experts", 1),
        "per_token": said("moe_router_topk", 2),
        "ffn_hidden_size": said("moe_ffn_hidden_size", config.ffn_hidden_size),
        "score": score,
        "normalised": score == "sigmoid" or not said("moe_router_pre_softmax", False),
        "scaling": said("moe_router_topk_scaling_factor", 1.0),
        "groups": said("moe_router_num_groups", 1),
        "groups_per_token": said("moe_router_group_topk", 1),
        "score_bias": said("moe_router_enable_expert_bias", False),
        "shared_ffn_hidden_size": said("moe_shared_expert_intermediate_size", None),
        "shared_gate": said("moe_shared_expert_gate", False),
        "dense_layers": tuple(dense),
    }
    return validate(Experts, values).model_dump()


def _pattern(text: str, path: Path) -> list[int]:
    """Return the layers of a pattern such as `([0]*3+[1]*58)`."""
    found: list[int] = []
    for part in text.replace(" ", "").replace("(", "").replace(")", "").split("+"):
        members, _, times = part.partition("*")
        inner = members.removeprefix("[").removesuffix("]").split(",")
        if not all(one in ("0", "1") for one in inner) or (times and not times.isdecimal()):
            raise AscendSpeedError(
                f"{path}: moe_layer_freq={text!r} is no sum of lists such as ([0]*3+[1]*58); write it so"
            )
        found += [int(one) for one in inner] * int(times or 1)
    return found


def _latents(arguments: Namespace, path: Path) -> dict[str, Any]:
    """Return multi-head latent attention, by the defaults of Megatron-LM."""

    def said(name: str, default: Any) -> Any:
        return getattr(arguments, name, default)

    turned, scaling = said("qk_pos_emb_head_dim", 64), None
    if said("rope_type", "yarn") == "yarn" and said("rotary_scaling_factor", 1.0) != 1:
        scaling = RotaryScaling(
            kind="yarn",
            factor=said("rotary_scaling_factor", 1.0),
            original_max_position_embeddings=said("original_max_position_embeddings", 4096),
            beta_fast=said("beta_fast", 32),
            beta_slow=said("beta_slow", 1),
            mscale=said("mscale", 1.0),
            mscale_all_dim=said("mscale_all_dim", 0.0),
        )
    return {
        "kv_latent_dim": said("kv_lora_rank", 32),
        "q_latent_dim": said("q_lora_rank", None),
        "rotary_dim": turned,
        "head_dim": said("qk_head_dim", 128) + turned,
        "value_head_dim": said("v_head_dim", 128),
        "num_key_value_heads": said("num_attention_heads", 1),
        "rotary_interleaved": True,
        "rotary_scaling": None if scaling is None else scaling.model_dump(),
    }


def _family(config: ModelConfig, changes: Mapping[str, Any]) -> str:
    """Return the family whose Hugging Face folder holds such a model."""
    experts = changes.get("experts") or {}
    if "kv_latent_dim" in changes:
        return "deepseek_v3" if experts.get("score") == "sigmoid" else "deepseek_v2"
    if config.qk_norm:
        return "qwen3_moe"
    return "qwen2_moe" if experts.get("shared_ffn_hidden_size") else "mixtral"
