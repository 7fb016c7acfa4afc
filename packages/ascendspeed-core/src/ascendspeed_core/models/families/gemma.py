"""Gemma 2 (2024) and the text models of Gemma 3 (2025).

Norms that multiply by 1 + weight before and after attention and MLP, an embedding scaled by sqrt(H), GeGLU, windows in
most layers. Gemma 2 caps scores and logits; Gemma 3 normalises queries and keys and has two rotary bases.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.attention_rules import Computed, LayerWindows, RotaryByLayer
from ascendspeed_core.models.families.base import ConfigRule, Family
from ascendspeed_core.models.families.config_rules import Heads, Rotary, key
from ascendspeed_core.models.families.decoder import (
    DROPOUTS,
    EMBEDDING_RULES,
    GATED_MLP_RULES,
    HEAD_RULES,
    INPUT_NORM_RULES,
    OUTPUT_RULES,
    QUERY_KEY_NORM_RULES,
    QUERY_KEY_VALUE_RULES,
    SIZES,
    layer_norm_rules,
    numbers,
    size,
)


class ScaledEmbedding:
    """The embedding is multiplied by the root of its width, which no key says."""

    keys: Sequence[str] = ()

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the factor."""
        return {"embedding_multiplier": float(hf["hidden_size"]) ** 0.5}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return nothing: it follows."""
        return {}


RULES = (
    *EMBEDDING_RULES,
    *INPUT_NORM_RULES,
    *QUERY_KEY_VALUE_RULES,
    *QUERY_KEY_NORM_RULES,
    *OUTPUT_RULES,
    *layer_norm_rules("attention_post_norm", "post_attention_layernorm"),
    *layer_norm_rules("mlp_norm", "pre_feedforward_layernorm"),
    *GATED_MLP_RULES,
    *layer_norm_rules("mlp_post_norm", "post_feedforward_layernorm"),
    *HEAD_RULES,
)

_CONFIG: tuple[ConfigRule, ...] = (
    *SIZES,
    *numbers(is_tied=True),
    Heads(),
    ScaledEmbedding(),
    key("attention_bias", "qkv_bias", "output_bias", default=False),
    Computed(
        "query_pre_attn_scalar",
        "attention_scale",
        256,
        read_as=lambda value, _: value**-0.5,
        written_as=lambda config: (config.attention_scale or 1.0) ** -2,
    ),
)
_MUST_BE: Mapping[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "hidden_act": ("gelu_pytorch_tanh", None),
    "use_bidirectional_attention": (False, None),
}
_FIXED = {"mlp": "geglu", "norm_placement": "both", "norm_unit_offset": True}
_IDS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def _size_2(heads: int, keys: int, head_dim: int, scalar: int, *sizes: int) -> dict[str, Any]:
    hidden, inner, layers = sizes
    more = {"num_key_value_heads": keys, "head_dim": head_dim, "query_pre_attn_scalar": scalar}
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
    return size(hidden, inner, layers, heads, 256000, 8192, **more, **caps, **_IDS)


GEMMA2 = Family(
    name="gemma2",
    model_type="gemma2",
    architectures=("Gemma2ForCausalLM",),
    config=(
        *_CONFIG,
        key("max_position_embeddings", default=8192),
        Rotary(),
        LayerWindows(every=2),
        key("attn_logit_softcapping", "attention_softcap", default=None),
        key("final_logit_softcapping", "logits_softcap", default=None),
    ),
    fixed=_FIXED,
    must_be=_MUST_BE,
    dropouts=DROPOUTS,
    # How transformers keeps keys and values, and the window once more.
    unused=("cache_implementation", "sliding_window_size"),
    rules=RULES,
    sizes={
        "gemma2-2b": _size_2(8, 4, 256, 256, 2304, 9216, 26),
        "gemma2-9b": _size_2(16, 8, 256, 256, 3584, 14336, 42),
        "gemma2-27b": _size_2(32, 16, 128, 144, 4608, 36864, 46),
    },
)

GEMMA3 = Family(
    name="gemma3",
    model_type="gemma3_text",
    architectures=("Gemma3ForCausalLM",),
    config=(
        *_CONFIG,
        key("max_position_embeddings", default=131072),
        RotaryByLayer(every=6, base=1e6, window_base=1e4, window_base_key="rope_local_base_freq"),
    ),
    fixed={**_FIXED, "qk_norm": True},
    must_be={**_MUST_BE, "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
    dropouts=DROPOUTS,
    unused=("cache_implementation",),
    rules=RULES,
    sizes={
        "gemma3-270m": size(
            640, 2048, 18, 4, 262144, 32768, num_key_value_heads=1, head_dim=256, sliding_window=512, **_IDS
        ),
        "gemma3-1b": size(
            1152, 6912, 26, 4, 262144, 32768, num_key_value_heads=1, head_dim=256, sliding_window=512, **_IDS
        ),
    },
)
