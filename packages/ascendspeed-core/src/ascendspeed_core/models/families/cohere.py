"""Command R (Cohere, 2024): LayerNorm without bias, one for attention and MLP, which run side by side; scaled logits.

Command R+ normalises each head with weights of its own. Command R7B (`cohere2`) has windows with rotary positions, and
every fourth layer neither.
"""

from collections.abc import Mapping
from typing import Any

from ascendspeed_core.models.families.attention_rules import LayerWindows
from ascendspeed_core.models.families.base import ConfigRule, Family, WeightRule
from ascendspeed_core.models.families.config_rules import Heads, Rotary, key
from ascendspeed_core.models.families.decoder import (
    DROPOUTS,
    EMBEDDING_RULES,
    GATED_MLP_RULES,
    HEAD_RULES,
    INPUT_NORM_RULES,
    MUST_BE,
    OUTPUT_RULES,
    QUERY_KEY_VALUE_RULES,
    SIZES,
    numbers,
    size,
)

RULES = (
    *EMBEDDING_RULES,
    *INPUT_NORM_RULES,
    *QUERY_KEY_VALUE_RULES,
    *(
        WeightRule(
            f"layers.{{layer}}.attention.{name}_heads_norm.weight",
            f"model.layers.{{layer}}.self_attn.{name}_norm.weight",
            when="qk_norm",
        )
        for name in ("q", "k")
    ),
    *OUTPUT_RULES,
    *GATED_MLP_RULES,
    *HEAD_RULES,
)
_CONFIG: tuple[ConfigRule, ...] = (
    *SIZES,
    *numbers("layer_norm_eps", 1e-5, is_tied=True),
    key("max_position_embeddings", default=8192),
    Heads(),
    Rotary(),
    key("attention_bias", "qkv_bias", "output_bias", default=False),
    key("logit_scale", "logits_multiplier", default=0.0625),
)
_FIXED = {
    "norm": "layernorm",
    "norm_bias": False,
    "parallel_blocks": True,
    "rotary_interleaved": True,
    "qk_norm_kind": "by_head",
}
_IDS = {"bos_token_id": 5, "eos_token_id": 255001, "pad_token_id": 0}


class TurnedWindows(LayerWindows):
    """Windows by layer; only layers that have one turn queries and keys."""

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return windows, and the layers with rotary positions."""
        values = super().read(hf)
        turned = () if values["sliding_window"] is None else values["window_layers"]
        return values | {"rotary_layers": turned}


COHERE = Family(
    name="cohere",
    model_type="cohere",
    architectures=("CohereForCausalLM",),
    config=(*_CONFIG, key("use_qk_norm", "qk_norm", default=False)),
    fixed=_FIXED,
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    # A length that the model was not trained for, and how it was trained.
    unused=("model_max_length", "pretraining_tp"),
    rules=RULES,
    sizes={
        "command-r-v01": size(8192, 22528, 40, 64, 256000, 8192, rope_theta=8000000.0, **_IDS),
        "command-r-plus": size(
            12288, 33792, 64, 96, 256000, 8192, num_key_value_heads=8, rope_theta=75000000.0,
            logit_scale=0.8333333333333334, use_qk_norm=True, **_IDS,
        ),
    },
)  # fmt: skip

COHERE2 = Family(
    name="cohere2",
    model_type="cohere2",
    architectures=("Cohere2ForCausalLM",),
    config=(*_CONFIG, TurnedWindows(every=4)),
    fixed=_FIXED,
    must_be={
        **MUST_BE,
        "use_qk_norm": (False,),
        "rotary_pct": (1.0,),
        "position_embedding_type": ("rope_gptj",),
        "use_parallel_block": (True,),
        "use_gated_activation": (True,),
        "use_embedding_sharing": (True,),
        "order_of_interleaved_layers": ("local_attn_first",),
    },
    dropouts=DROPOUTS,
    # The pattern of layers once more, how transformers keeps keys, and a name of how the first two were cut.
    unused=("layer_switch", "cache_implementation", "use_parallel_embedding"),
    rules=RULES,
    sizes={
        "command-r7b": size(
            4096, 14336, 32, 32, 256000, 8192, num_key_value_heads=8, rope_theta=50000.0, logit_scale=0.25,
            sliding_window=4096, **_IDS,
        ),
    },
)  # fmt: skip
