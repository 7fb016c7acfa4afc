"""OLMo 2 (2024) and OLMo 3 (2025): norms after attention and MLP alone, one norm over all heads of queries and keys."""

from typing import Any

from ascendspeed_core.models.families.attention_rules import RotaryByLayer
from ascendspeed_core.models.families.base import ConfigRule, Family, WeightRule
from ascendspeed_core.models.families.config_rules import Heads, Rotary, key
from ascendspeed_core.models.families.decoder import (
    DROPOUTS,
    EMBEDDING_RULES,
    GATED_MLP_RULES,
    HEAD_RULES,
    LENGTH,
    MUST_BE,
    OUTPUT_RULES,
    QUERY_KEY_VALUE_RULES,
    SIZES,
    layer_norm_rules,
    numbers,
    size,
)

RULES = (
    *EMBEDDING_RULES,
    *QUERY_KEY_VALUE_RULES,
    *(
        WeightRule(
            f"layers.{{layer}}.attention.{name}_heads_norm.weight",
            f"model.layers.{{layer}}.self_attn.{name}_norm.weight",
        )
        for name in ("q", "k")
    ),
    *OUTPUT_RULES,
    *layer_norm_rules("attention_post_norm", "post_attention_layernorm"),
    *GATED_MLP_RULES,
    *layer_norm_rules("mlp_post_norm", "post_feedforward_layernorm"),
    *HEAD_RULES,
)
_CONFIG: tuple[ConfigRule, ...] = (
    *SIZES,
    *numbers(epsilon_value=1e-5),
    LENGTH,
    Heads(),
    key("attention_bias", "qkv_bias", "output_bias", default=False),
)
_FIXED = {"qk_norm": True, "qk_norm_kind": "all_heads", "norm_placement": "after"}
_IDS = {"eos_token_id": 100257, "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_theta": 500000.0}


def _size_3(*sizes: int, **more: Any) -> dict[str, Any]:
    lengths = {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 8192}
    scaling = {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836, **lengths}
    hidden, inner, layers, heads = sizes
    return size(
        hidden, inner, layers, heads, 100278, 65536, rope_scaling=scaling, sliding_window=4096, **more
    )


OLMO2 = Family(
    name="olmo2",
    model_type="olmo2",
    architectures=("Olmo2ForCausalLM",),
    config=(*_CONFIG, Rotary()),
    fixed=_FIXED,
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=RULES,
    sizes={
        "olmo2-1b": size(2048, 8192, 16, 16, 100352, 4096, **_IDS),
        "olmo2-7b": size(4096, 11008, 32, 32, 100352, 4096, **_IDS),
        "olmo2-13b": size(5120, 13824, 40, 40, 100352, 4096, **_IDS),
        "olmo2-32b": size(5120, 27648, 64, 40, 100352, 4096, num_key_value_heads=8, **_IDS),
    },
)

OLMO3 = Family(
    name="olmo3",
    model_type="olmo3",
    architectures=("Olmo3ForCausalLM",),
    config=(*_CONFIG, RotaryByLayer(every=4, base=500000.0)),
    fixed=_FIXED,
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=RULES,
    sizes={
        "olmo3-7b": _size_3(4096, 11008, 32, 32, **_IDS),
        "olmo3-32b": _size_3(5120, 27648, 64, 40, num_key_value_heads=8, **_IDS),
    },
)
