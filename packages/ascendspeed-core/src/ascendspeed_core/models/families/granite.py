"""Models with multipliers: Granite 3 (IBM, 2024) and MiniCPM (OpenBMB, 2024); and SmolLM3 (2025)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.attention_rules import Computed
from ascendspeed_core.models.families.base import ConfigRule, Family
from ascendspeed_core.models.families.config_rules import Heads, Rotary, key, whole_number
from ascendspeed_core.models.families.decoder import (
    CONFIG,
    DROPOUTS,
    LENGTH,
    MUST_BE,
    RULES,
    SIZES,
    numbers,
    size,
)
from ascendspeed_data.errors import AscendSpeedError

_BIASES: tuple[ConfigRule, ...] = (
    key("attention_bias", "qkv_bias", "output_bias", default=False),
    key("mlp_bias", default=False),
)


def _granite(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    factors = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "num_key_value_heads": 8}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True}
    return size(
        hidden,
        inner,
        layers,
        heads,
        49155,
        131072,
        rms_norm_eps=1e-5,
        rope_theta=1e7,
        **factors,
        **ids,
        **more,
    )


GRANITE = Family(
    name="granite",
    model_type="granite",
    architectures=("GraniteForCausalLM",),
    config=(
        *CONFIG,
        *_BIASES,
        key("embedding_multiplier", default=1.0),
        key("residual_multiplier", default=1.0),
        key("attention_multiplier", "attention_scale", default=1.0),
        Computed(
            "logits_scaling",
            "logits_multiplier",
            1.0,
            read_as=lambda value, _: 1 / value,
            written_as=lambda config: 1 / config.logits_multiplier,
        ),
    ),
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=RULES,
    sizes={
        "granite3.1-2b": _granite(2048, 8192, 40, 32, attention_multiplier=0.015625, logits_scaling=8.0),
        "granite3.1-8b": _granite(4096, 12800, 40, 32, attention_multiplier=0.0078125, logits_scaling=16.0),
    },
)  # fmt: skip


def _root_of_layers(hf: Mapping[str, Any]) -> float:
    return math.sqrt(whole_number(hf, "num_hidden_layers"))


MINICPM = Family(
    name="minicpm",
    model_type="minicpm",
    architectures=("MiniCPMForCausalLM",),
    config=(
        *SIZES,
        *numbers(is_tied=True),
        LENGTH,
        Heads(),
        Rotary(),
        key("attention_bias", "qkv_bias", "output_bias", default=False),
        key("scale_emb", "embedding_multiplier", default=1),
        Computed(
            "scale_depth",
            "residual_multiplier",
            1,
            read_as=lambda value, hf: value / _root_of_layers(hf),
            written_as=lambda config: config.residual_multiplier * math.sqrt(config.num_layers),
        ),
        Computed(
            "dim_model_base",
            "logits_multiplier",
            1,
            read_as=lambda value, hf: value / whole_number(hf, "hidden_size"),
            written_as=lambda config: config.logits_multiplier * config.hidden_size,
        ),
    ),
    must_be={**MUST_BE, "num_experts": (0,)},
    dropouts=DROPOUTS,
    unused=("pretraining_tp",),
    rules=RULES,
    sizes={
        "minicpm-1b": size(
            1536, 3840, 52, 24, 73440, 4096, num_key_value_heads=8, scale_emb=12, dim_model_base=256,
            scale_depth=1.4, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        ),
        "minicpm-2b": size(
            2304, 5760, 40, 36, 122753, 4096, num_key_value_heads=36, scale_emb=12, dim_model_base=256,
            scale_depth=1.4, rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2,
        ),
    },
)  # fmt: skip


class LayersWithoutRotary:
    """SmolLM3: a list with a 1 for each layer that turns queries and keys; or every layer but each n-th."""

    keys: Sequence[str] = (
        "no_rope_layers",
        "no_rope_layer_interval",
        "layer_types",
        "use_sliding_window",
        "sliding_window",
        "max_window_layers",
    )

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return the layers with rotary positions; a window is refused, which no published model has."""
        count, interval = whole_number(hf, "num_hidden_layers"), hf.get("no_rope_layer_interval", 4)
        if hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ()):
            raise AscendSpeedError(
                "use_sliding_window=true is not supported for smollm3; no published model has it"
            )
        stated = hf.get("no_rope_layers") or [int((number + 1) % interval != 0) for number in range(count)]
        if len(stated) != count or set(stated) - {0, 1}:
            raise AscendSpeedError(
                f"no_rope_layers must have a 0 or 1 for each of num_hidden_layers={count} layers; correct it"
            )
        turned = tuple(number for number, is_turned in enumerate(stated) if is_turned)
        return {"rotary_layers": None if len(turned) == count else turned}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the list."""
        return {
            "no_rope_layers": [int(config.has_rotary(layer)) for layer in range(config.num_layers)],
            "layer_types": ["full_attention"] * config.num_layers,
            "use_sliding_window": False,
        }


SMOLLM3 = Family(
    name="smollm3",
    model_type="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    config=(
        *SIZES,
        *numbers(is_tied=True),
        key("max_position_embeddings", default=32768),
        Heads(),
        Rotary(),
        *_BIASES,
        LayersWithoutRotary(),
    ),
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    unused=("pretraining_tp",),
    rules=RULES,
    sizes={
        "smollm3-3b": size(
            2048, 11008, 36, 16, 128256, 65536, num_key_value_heads=4, rope_theta=5000000.0, rms_norm_eps=1e-6,
            bos_token_id=128000, eos_token_id=128012, pad_token_id=128004,
        ),
    },
)  # fmt: skip
