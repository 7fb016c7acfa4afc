"""GLM-4: half of each head turned by neighbours, packed gate and up; from 0414 on norms after attention and MLP too."""

from ascendspeed_core.models.families.attention_rules import PartialRotary
from ascendspeed_core.models.families.base import ConfigRule, Family
from ascendspeed_core.models.families.config_rules import Heads, key
from ascendspeed_core.models.families.decoder import (
    DROPOUTS,
    EMBEDDING_RULES,
    HEAD_RULES,
    INPUT_NORM_RULES,
    MLP_NORM_RULES,
    MUST_BE,
    OUTPUT_RULES,
    PACKED_MLP_RULES,
    QUERY_KEY_VALUE_RULES,
    SIZES,
    layer_norm_rules,
    numbers,
    size,
)

RULES = (
    *EMBEDDING_RULES,
    *INPUT_NORM_RULES,
    *QUERY_KEY_VALUE_RULES,
    *OUTPUT_RULES,
    *MLP_NORM_RULES,
    *PACKED_MLP_RULES,
    *HEAD_RULES,
)
_CONFIG: tuple[ConfigRule, ...] = (
    *SIZES,
    *numbers(epsilon_value=1.5625e-7),
    key("max_position_embeddings", default=131072),
    Heads(),
    PartialRotary(default_share=0.5),
    key("attention_bias", "qkv_bias", default=True),
)
_IDS = {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329, "head_dim": 128}

GLM = Family(
    name="glm",
    model_type="glm",
    architectures=("GlmForCausalLM",),
    config=_CONFIG,
    fixed={"rotary_interleaved": True},
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=RULES,
    sizes={
        "glm4-9b-chat": size(4096, 13696, 40, 32, 151552, 131072, num_key_value_heads=2, **_IDS),
    },
)

GLM4 = Family(
    name="glm4",
    model_type="glm4",
    architectures=("Glm4ForCausalLM",),
    config=_CONFIG,
    fixed={"rotary_interleaved": True, "norm_placement": "both"},
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=(
        *RULES,
        *layer_norm_rules("attention_post_norm", "post_self_attn_layernorm"),
        *layer_norm_rules("mlp_post_norm", "post_mlp_layernorm"),
    ),
    sizes={
        "glm4-9b-0414": size(
            4096, 13696, 40, 32, 151552, 32768, num_key_value_heads=2, rms_norm_eps=1e-5, **_IDS
        ),
        "glm4-32b-0414": size(
            6144, 23040, 61, 48, 151552, 32768, num_key_value_heads=8, attention_bias=False, rms_norm_eps=1e-5, **_IDS
        ),
    },
)  # fmt: skip
