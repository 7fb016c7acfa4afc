"""InternLM: LLaMA with biases in some; 2 and 2.5 have other names, and queries, keys and values in one tensor."""

from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.attention_rules import UnstretchedRotary
from ascendspeed_core.models.families.base import Family, WeightRule
from ascendspeed_core.models.families.config_rules import Heads, Rotary, key
from ascendspeed_core.models.families.decoder import (
    DROPOUTS,
    LENGTH,
    MUST_BE,
    NUMBERS,
    RULES,
    SIZES,
    numbers,
    size,
)
from ascendspeed_core.models.families.packing import Packed
from ascendspeed_data.errors import AscendSpeedError


class InternLMRotary(Rotary):
    """InternLM's own `rotary` key.

    Its type `dynamic` changes frequencies only beyond `max_position_embeddings`, which no run here goes beyond, so
    it is the same as `origin`.
    """

    keys: Sequence[str] = ("rotary", *Rotary.keys)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return base and scaling."""
        own = hf.get("rotary") or {}
        if own.get("type", "origin") not in ("origin", "dynamic"):
            raise AscendSpeedError(f"rotary={own!r} is not supported; origin and dynamic are")
        return super().read({"rope_theta": own.get("base"), **hf})

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return InternLM's key."""
        return {"rotary": {"base": config.rotary_base, "type": "origin"}}


INTERNLM = Family(
    name="internlm",
    model_type="internlm",
    architectures=("InternLMForCausalLM",),
    config=(
        *SIZES,
        LENGTH,
        *NUMBERS,
        Heads(is_grouped=False, writes_head_dim=False),
        InternLMRotary(),
        key("bias", "qkv_bias", "output_bias", default=True),
    ),
    must_be={"hidden_act": MUST_BE["hidden_act"]},
    rules=RULES,
    sizes={
        "internlm-7b": size(
            4096, 11008, 32, 32, 103168, 2048, bias=True, rms_norm_eps=1e-6, bos_token_id=1, eos_token_id=2,
            pad_token_id=2,
        ),
    },
)  # fmt: skip

_LAYER = "model.layers.{layer}"

INTERNLM2_RULES = (
    WeightRule("embedding.weight", "model.tok_embeddings.weight"),
    WeightRule("layers.{layer}.attention_norm.weight", f"{_LAYER}.attention_norm.weight"),
    *(
        WeightRule(
            f"layers.{{layer}}.attention.{name}_proj.{kind}",
            f"{_LAYER}.attention.wqkv.{kind}",
            when="qkv_bias" if kind == "bias" else None,
            packed=Packed(part, "by_head"),
        )
        for kind in ("weight", "bias")
        for part, name in enumerate(("q", "k", "v"))
    ),
    WeightRule("layers.{layer}.attention.o_proj.weight", f"{_LAYER}.attention.wo.weight"),
    WeightRule("layers.{layer}.attention.o_proj.bias", f"{_LAYER}.attention.wo.bias", when="output_bias"),
    WeightRule("layers.{layer}.mlp_norm.weight", f"{_LAYER}.ffn_norm.weight"),
    WeightRule("layers.{layer}.mlp.gate_proj.weight", f"{_LAYER}.feed_forward.w1.weight"),
    WeightRule("layers.{layer}.mlp.up_proj.weight", f"{_LAYER}.feed_forward.w3.weight"),
    WeightRule("layers.{layer}.mlp.down_proj.weight", f"{_LAYER}.feed_forward.w2.weight"),
    WeightRule("final_norm.weight", "model.norm.weight"),
    WeightRule("output_head.weight", "output.weight", tied=True),
)
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "rms_norm_eps": 1e-5}


def _size_2(*sizes: int, keys: int = 8) -> dict[str, Any]:
    hidden, inner, layers, heads = sizes
    return size(
        hidden,
        inner,
        layers,
        heads,
        92544,
        32768,
        num_key_value_heads=keys,
        rope_theta=1e6,
        bias=False,
        **_IDS,
    )


INTERNLM2 = Family(
    name="internlm2",
    model_type="internlm2",
    architectures=("InternLM2ForCausalLM",),
    config=(
        *SIZES,
        *numbers(),
        LENGTH,
        Heads(writes_head_dim=False),
        UnstretchedRotary(),
        key("bias", "qkv_bias", "output_bias", default=True),
    ),
    must_be=MUST_BE,
    # In how many parts it was trained, and which program attended.
    unused=("pretraining_tp", "attn_implementation"),
    rules=INTERNLM2_RULES,
    sizes={
        "internlm2-1.8b": _size_2(2048, 8192, 24, 16),
        "internlm2-7b": _size_2(4096, 14336, 32, 32),
        "internlm2-20b": _size_2(6144, 16384, 48, 48),
        "internlm2.5-7b": _size_2(4096, 14336, 32, 32),
    },
)

INTERNLM3 = Family(
    name="internlm3",
    model_type="internlm3",
    architectures=("InternLM3ForCausalLM",),
    config=(
        *SIZES,
        *numbers(),
        key("max_position_embeddings", default=32768),
        Heads(),
        UnstretchedRotary(),
        key("qkv_bias", default=False, also=("attention_bias",)),
        key("bias", "output_bias", "mlp_bias", default=False, also=("mlp_bias",)),
    ),
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=RULES,
    sizes={
        "internlm3-8b": size(
            4096, 10240, 48, 32, 128512, 32768, num_key_value_heads=2, head_dim=128, rope_theta=5e7, **_IDS
        ),
    },
)
