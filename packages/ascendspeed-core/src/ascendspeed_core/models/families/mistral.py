"""Mistral 7B (Jiang et al., 2023): LLaMA with grouped-query attention, at first with a sliding window."""

from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.decoder import CONFIG, DROPOUTS, MUST_BE, RULES, size

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}


class Window:
    """An absent key is the 4,096 of the first release, as in transformers; a null is no window."""

    keys: Sequence[str] = ("sliding_window",)

    def read(self, hf: Mapping[str, Any]) -> dict[str, Any]:
        """Tell an absent key from a null."""
        return {"sliding_window": hf.get("sliding_window", 4096)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the key."""
        return {"sliding_window": config.sliding_window}


MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architectures=("MistralForCausalLM",),
    config=(*CONFIG, Window()),
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    rules=RULES,
    sizes={
        "mistral-7b-v0.1": size(4096, 14336, 32, 32, 32000, 32768, sliding_window=4096, **_IDS),
        "mistral-7b-v0.3": size(
            4096, 14336, 32, 32, 32768, 32768, sliding_window=None, rope_theta=1000000.0, **_IDS
        ),
    },
)
