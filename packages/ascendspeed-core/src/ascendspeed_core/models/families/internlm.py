"""InternLM 7B: LLaMA with a bias on queries, keys, values and the attention's output."""

from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.config_rules import Heads, Rotary, key
from ascendspeed_core.models.families.decoder import LENGTH, MUST_BE, NUMBERS, RULES, SIZES, size
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
