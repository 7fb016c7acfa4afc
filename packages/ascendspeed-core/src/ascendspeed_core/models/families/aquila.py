"""Aquila 7B (BAAI): LLaMA's architecture under a name of its own."""

from ascendspeed_core.models.families.base import Family
from ascendspeed_core.models.families.decoder import CONFIG, DROPOUTS, MUST_BE, RULES, size

AQUILA = Family(
    name="aquila",
    model_type="aquila",
    architectures=("AquilaForCausalLM", "AquilaModel"),
    config=CONFIG,
    must_be=MUST_BE,
    dropouts=DROPOUTS,
    unused=("pretraining_tp",),
    rules=RULES,
    sizes={
        "aquila-7b": size(
            4096, 11008, 32, 32, 100008, 2048, rms_norm_eps=1e-6, bos_token_id=100006, eos_token_id=100007,
            pad_token_id=0,
        ),
    },
)  # fmt: skip
