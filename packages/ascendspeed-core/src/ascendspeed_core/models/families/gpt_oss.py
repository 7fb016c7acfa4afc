"""gpt-oss (OpenAI, 2025): sinks, a window in every other layer, experts with biases and clamped SwiGLU."""

from collections.abc import Mapping
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.attention_rules import LayerWindows
from ascendspeed_core.models.families.base import Family, WeightRule
from ascendspeed_core.models.families.config_rules import Heads, Rotary, key
from ascendspeed_core.models.families.decoder import DROPOUTS, MUST_BE, SIZES, numbers, size
from ascendspeed_core.models.families.expert_rules import (
    INDICES,
    PLAIN_RULES,
    ROUTER_TRAINING_KEYS,
    ExpertKeys,
)
from ascendspeed_core.models.families.packing import Alternating
from ascendspeed_data.errors import AscendSpeedError

_OURS, _THEIRS = "layers.{layer}.mlp", "model.layers.{layer}.mlp"
_BASE = 150000.0


class StatedRotary(Rotary):
    """Rotary positions that a config must say: transformers takes YARN where it says nothing."""

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Return base and scaling."""
        if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
            raise AscendSpeedError(
                "rope_scaling is missing, and has no default; add it, or rope_parameters with rope_type default"
            )
        stated = {"rope_theta": _BASE} if hf.get("rope_theta") is None else {}
        inner = [
            hf[name] for name in ("rope_parameters", "rope_scaling") if isinstance(hf.get(name), Mapping)
        ]
        is_inside = any(one.get("rope_theta") is not None for one in inner)
        return super().read(hf if is_inside else {**hf, **stated})

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys of transformers 4, which 5 reads too; without scaling those of both, which differ."""
        if config.rotary_scaling is not None:
            return super().write(config)
        said = {"rope_type": "default", "rope_theta": config.rotary_base}
        return {"rope_scaling": None, "rope_theta": config.rotary_base, "rope_parameters": said}


_EXPERT_RULES = (
    WeightRule(f"{_OURS}.router.weight", f"{_THEIRS}.router.weight"),
    WeightRule(f"{_OURS}.router.logits_bias", f"{_THEIRS}.router.bias"),
    *(
        WeightRule(
            f"{_OURS}.experts.{{expert}}.{name}.{kind}",
            f"{_THEIRS}.experts.gate_up_proj{suffix}",
            packed=Alternating(part),
            transposed=True,
        )
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
        for part, name in enumerate(("gate_proj", "up_proj"))
    ),
    *(
        WeightRule(
            f"{_OURS}.experts.{{expert}}.down_proj.{kind}",
            f"{_THEIRS}.experts.down_proj{suffix}",
            transposed=True,
        )
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    ),
)
_SINK_RULES = (WeightRule("layers.{layer}.attention.sinks.weight", "model.layers.{layer}.self_attn.sinks"),)
_COMMON = {
    "num_key_value_heads": 8, "head_dim": 64, "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5,
    "rope_theta": _BASE, "swiglu_limit": 7.0, "eos_token_id": 200002, "pad_token_id": 199999,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
        "beta_slow": 1.0, "truncate": False,
    },
}  # fmt: skip

GPT_OSS = Family(
    name="gpt_oss",
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM",),
    config=(
        *SIZES,
        *numbers(epsilon_value=1e-5),
        key("max_position_embeddings", default=131072),
        Heads(),
        StatedRotary(),
        LayerWindows(every=2, window=128),
        key("attention_bias", "qkv_bias", "output_bias", default=True),
        ExpertKeys(
            "num_local_experts",
            "intermediate_size",
            fixed={"score_after_choice": True, "biases": True},
            more=(key("swiglu_limit", "clamp", default=7.0),),
        ),
    ),
    fixed={"attention_sinks": True},
    must_be={**MUST_BE, "swiglu_alpha": (1.702,)},
    dropouts=DROPOUTS,
    unused=(*ROUTER_TRAINING_KEYS, "experts_per_token", "initial_context_length"),
    rules=PLAIN_RULES + _SINK_RULES + _EXPERT_RULES,
    indices=INDICES,
    sizes={
        "gpt-oss-20b": size(2880, 2880, 24, 64, 201088, 131072, **_COMMON, num_local_experts=32),
        "gpt-oss-120b": size(2880, 2880, 36, 64, 201088, 131072, **_COMMON, num_local_experts=128),
    },
)
