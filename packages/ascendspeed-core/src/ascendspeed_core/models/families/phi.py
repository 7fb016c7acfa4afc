"""Phi-3 and Phi-4 (2024): LLaMA with packed projections; a window in some, part of each head turned in others."""

from ascendspeed_core.models.families.attention_rules import PartialRotary
from ascendspeed_core.models.families.base import Family
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
    PACKED_QUERY_KEY_VALUE_RULES,
    SIZES,
    numbers,
    size,
)

_IDS_3 = {"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000}
_IDS_4 = {"bos_token_id": 100257, "eos_token_id": 100265, "pad_token_id": 100257}

PHI3 = Family(
    name="phi3",
    model_type="phi3",
    architectures=("Phi3ForCausalLM",),
    config=(
        *SIZES,
        *numbers(epsilon_value=1e-5),
        key("max_position_embeddings", default=4096),
        Heads(),
        # transformers reads `yarn` and `su` as longrope here.
        PartialRotary(is_scaled=False),
        key("sliding_window", default=None),
    ),
    must_be={**MUST_BE, "resid_pdrop": (0.0,), "embd_pdrop": (0.0,), "attention_bias": (False,)},
    dropouts=DROPOUTS,
    rules=(
        *EMBEDDING_RULES,
        *INPUT_NORM_RULES,
        *PACKED_QUERY_KEY_VALUE_RULES,
        *OUTPUT_RULES,
        *MLP_NORM_RULES,
        *PACKED_MLP_RULES,
        *HEAD_RULES,
    ),
    sizes={
        "phi3-mini-4k": size(3072, 8192, 32, 32, 32064, 4096, sliding_window=2047, **_IDS_3),
        "phi3-medium-4k": size(
            5120, 17920, 40, 40, 32064, 4096, num_key_value_heads=10, sliding_window=2047, **_IDS_3
        ),
        "phi4": size(
            5120, 17920, 40, 40, 100352, 16384, num_key_value_heads=10, rope_theta=250000.0, **_IDS_4
        ),
    },
)
