"""The architecture that Megatron-LM's arguments and the tensors beside them describe together."""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from ascendspeed_core.config.load import validate
from ascendspeed_core.config.model import ModelConfig, RotaryScaling
from ascendspeed_core.weights.shard_layout import ShardLayout
from ascendspeed_core.weights.source import CheckpointError, ReadableTensor, UnknownModelError
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import ConfigError

MUST_BE: dict[str, tuple[Any, ...]] = {
    "num_experts": (None, 0),
    "multi_latent_attention": (False, None),
    "rotary_percent": (1.0, None),
    "rotary_interleaved": (False, None),
    "apply_layernorm_1p": (False, None),
    "squared_relu": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "no_rope_freq": (None, 0),
    "qk_l2_norm": (False, None),
    "softmax_type": ("vanilla", None),
    "window_attn_skip_freq": (None,),
    "attention_output_gate": (False, None),
    "activation_func_clamp_value": (None,),
    "rope_scaling_type": (None,),
    "noop_layers": (None,),
    "post_norm": (False, None),
    "geglu": (False, None),
    "use_glm_rope": (False, None),
    "add_rmsnorm_offset": (False, None),
    "input_embeds_norm": (False, None),
    "embedding_multiplier_scale": (None, 1.0),
    "output_multiplier_scale": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "output_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "sliding_window": (None,),
    "interleave_sliding_window": (None,),
    "scale_emb": (None, 1.0),
    "scale_depth": (None,),
    "dim_model_base": (None,),
}
"""Arguments whose other values would need more of the architecture than arguments describe.

Megatron-LM's and, from `rope_scaling_type` on, those that MindSpeed-LLM adds.
"""

_OTHER_POSITIONS = ("none", "relative", "mrope", "yarn")
"""Values of `position_embedding_type` that no tensor shows, and that are not computed by arguments alone."""


@dataclass(frozen=True)
class CheckpointFacts:
    """What the files of a checkpoint say of themselves, besides their arguments.

    Attributes:
        kind: `ascendspeed` or `megatron`.
        naming: name of the name map.
        folder: for messages.
        layout: how layers are spread.
        first: stored tensors of the first stage.
        vocabulary_rows: rows of the embedding with padding.
    """

    kind: str
    naming: str
    folder: Path
    layout: ShardLayout
    first: Mapping[str, ReadableTensor]
    vocabulary_rows: int

    @property
    def num_layers(self) -> int:
        """Layers that are there."""
        return sum(len(layers) for stage in self.layout.chunks for layers in stage)

    def shape(self, ending: str) -> tuple[int, ...] | None:
        """Return the shape of the first stage's tensor whose name ends so, if there is one."""
        return next((found.info.shape for key, found in self.first.items() if key.endswith(ending)), None)


def config_of_arguments(facts: CheckpointFacts, arguments: Namespace, vocab_size: int | None) -> ModelConfig:
    """Return the architecture that arguments and tensors describe together.

    Raises:
        CheckpointError: they leave something undefined.
    """
    for name, allowed in MUST_BE.items():
        if getattr(arguments, name, allowed[0]) not in allowed:
            raise UnknownModelError(
                f"{facts.folder}: its arguments say {name}={getattr(arguments, name)!r}, which they do not describe "
                "fully; name the model's config.json with --model-config"
            )
    heads = _number(facts, arguments, "num_attention_heads")
    hidden = _number(facts, arguments, "hidden_size")
    grouped = getattr(arguments, "group_query_attention", False)
    is_gpt = facts.naming == "GPT" or (facts.kind == "megatron" and not getattr(arguments, "swiglu", False))
    position = _position(facts, arguments)
    norm = "layernorm" if facts.shape("input_layernorm.bias") or facts.shape("layer_norm_bias") else "rmsnorm"
    values: dict[str, Any] = {
        "vocab_size": vocab_size or _vocab_size(facts, arguments),
        "hidden_size": hidden,
        "ffn_hidden_size": _number(facts, arguments, "ffn_hidden_size"),
        "num_layers": facts.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(arguments, "num_query_groups", None) if grouped else heads,
        "head_dim": getattr(arguments, "kv_channels", None) or hidden // heads,
        "max_position_embeddings": getattr(arguments, "max_position_embeddings", None)
        or _number(facts, arguments, "seq_length"),
        "norm_epsilon": getattr(arguments, "norm_epsilon", None)
        or getattr(arguments, "layernorm_epsilon", 1e-5),
        "rotary_base": _positive(facts, arguments, "rotary_base", 10000.0),
        "tie_word_embeddings": _is_tied(facts, arguments),
        "initializer_range": getattr(arguments, "init_method_std", None) or 0.02,
        "rotary_scaling": _rope_scaling(facts, arguments),
        "sliding_window": _window(facts, arguments),
        "norm": norm,
        "position": position,
        "mlp": "gelu" if is_gpt else "swiglu",
        "qkv_bias": any(
            facts.shape(f"{name}.bias") is not None for name in ("linear_qkv", "query_key_value")
        ),
        "output_bias": any(
            facts.shape(f"{name}.bias") is not None for name in ("linear_proj", "attention.dense")
        ),
        "mlp_bias": any(facts.shape(f"{name}.bias") is not None for name in ("linear_fc2", "dense_4h_to_h")),
        "embedding_norm": facts.shape("word_embeddings.norm.weight") is not None,
        "qk_norm": facts.shape("q_layernorm.weight") is not None,
    }
    values["family"] = _family(values)
    try:
        config = validate(ModelConfig, values)
    except ConfigError as error:
        raise CheckpointError(f"{facts.folder}: its arguments describe no valid model: {error}") from None
    log(f"{facts.folder}: architecture taken from its arguments, family {config.family}")
    return config


def llama3_by_factor(factor: float) -> RotaryScaling:
    """Return what Megatron-LM's `--use-rope-scaling` does: Llama 3.1's scaling, whose other constants are fixed."""
    return RotaryScaling(
        kind="llama3",
        factor=factor,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


def _position(facts: CheckpointFacts, arguments: Namespace) -> str:
    """Return how positions are computed; the GPT model of 2023 has ALiBi, or positions that its tensors show.

    Raises:
        UnknownModelError: the arguments name another kind.
    """
    said = getattr(arguments, "position_embedding_type", None)
    if said in (("rope", "rotary") if facts.naming == "GPT" else _OTHER_POSITIONS):
        raise UnknownModelError(
            f"{facts.folder}: its arguments say position_embedding_type={said!r}, which is not read from arguments for "
            f"{facts.naming} models; name the model's config.json with --model-config"
        )
    return "alibi" if "alibi" in str(said) or facts.naming == "GPT" else "rotary"


def _rope_scaling(facts: CheckpointFacts, arguments: Namespace) -> RotaryScaling | None:
    """Return how rotary frequencies are changed: Llama 3.1's scaling, or positions divided by a factor."""
    stretch = _positive(facts, arguments, "rotary_seq_len_interpolation_factor", 1.0)
    if not getattr(arguments, "use_rope_scaling", False):
        return None if stretch == 1 else RotaryScaling(kind="linear", factor=stretch)
    if stretch != 1:
        raise UnknownModelError(
            f"{facts.folder}: its arguments say rotary_seq_len_interpolation_factor={stretch:g} and use_rope_scaling, "
            "which are not done together; name the model's config.json with --model-config"
        )
    return llama3_by_factor(_positive(facts, arguments, "rope_scaling_factor", 8.0))


def _window(facts: CheckpointFacts, arguments: Namespace) -> int | None:
    """Return how many positions attention reaches, itself included; `None` for all before it."""
    window = getattr(arguments, "window_size", None)
    if window is None:
        return None
    is_pair = isinstance(window, tuple | list) and len(window) == 2
    if not is_pair or any(type(reach) is not int or reach < -1 for reach in window):
        raise CheckpointError(
            f"{facts.folder}: its arguments say window_size={window!r}, which is not how far attention reaches back "
            "and ahead; name the model's config.json with --model-config"
        )
    return None if window[0] == -1 else window[0] + 1


def _positive(facts: CheckpointFacts, arguments: Namespace, name: str, default: float) -> float:
    """Return an argument that must be a number above zero; the default where it is not there."""
    value = getattr(arguments, name, None)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise UnknownModelError(
            f"{facts.folder}: its arguments say {name}={value!r}, which is no number above zero; name the model's "
            "config.json with --model-config"
        )
    return float(value)


def _vocab_size(facts: CheckpointFacts, arguments: Namespace) -> int:
    said = getattr(arguments, "vocab_size", None)
    if isinstance(said, int) and 0 < said <= facts.vocabulary_rows:
        return said
    raise UnknownModelError(
        f"{facts.folder}: its embedding has {facts.vocabulary_rows:,} rows, but nothing says how many of them are "
        "padding; give --orig-vocab-size, or --model-config with the model's config.json"
    )


def _number(facts: CheckpointFacts, arguments: Namespace, name: str) -> int:
    value = getattr(arguments, name, None)
    if not isinstance(value, int):
        raise UnknownModelError(
            f"{facts.folder}: its arguments do not say {name}; name the model's config.json with --model-config"
        )
    return value


def _is_tied(facts: CheckpointFacts, arguments: Namespace) -> bool:
    if facts.kind == "megatron":
        return not getattr(arguments, "untie_embeddings_and_output_weights", False)
    return facts.naming == "GPT"


def _family(values: Mapping[str, Any]) -> str:
    """Return the family whose Hugging Face folder holds such a model."""
    if values["mlp"] == "gelu":
        return "bloom"
    if values["position"] == "alibi":
        return "baichuan"
    if values["qk_norm"]:
        return "qwen3"
    if values["qkv_bias"]:
        return "internlm" if values["output_bias"] else "qwen2"
    return "llama"
