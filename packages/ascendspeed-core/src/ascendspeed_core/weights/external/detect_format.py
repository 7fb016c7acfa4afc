"""Detect the format of external files by the names of their tensors."""

from collections.abc import Iterable
from pathlib import Path

from ascendspeed_core.weights.external.name_maps import (
    NameMap,
    ascendspeed_gpt,
    ascendspeed_llama,
    megatron,
    modellink_llama,
)
from ascendspeed_core.weights.source import CheckpointError, Kind

STATES = "model_optim_rng.pt"
"""Name of every rank's file."""


def detect_name_map(names: Iterable[str], folder: Path) -> tuple[Kind, NameMap, str]:
    """Return kind of checkpoint, name map, and a name for the name map, by the tensors of the first stage.

    Raises:
        CheckpointError: no name map has such names.
    """
    names = list(names)

    def has(*parts: str) -> bool:
        return any(all(part in name for part in parts) for name in names)

    if has("decoder.layers.0.", "linear_qkv"):
        is_engine = has("linear_qkv.layer_norm_")
        is_grouped = has("mlp.experts.linear_fc1.weight") or (
            False if has("mlp.experts.local_experts.") else None
        )
        return "megatron", megatron(is_engine, is_grouped), "Transformer Engine" if is_engine else "local"
    if has("language_model.encoder.layers.0.", "query_key_value"):
        if has("mlp.gate_proj") or has("mlp.proj."):
            return "ascendspeed", modellink_llama(has("mlp.proj.")), "LLaMA of December 2023"
        return "ascendspeed", ascendspeed_gpt(), "GPT"
    if has("language_model.layers.0.", "attention.query_key_value"):
        return "ascendspeed", ascendspeed_llama(has("mlp.proj.")), "LLaMA"
    raise CheckpointError(
        f"{folder}: the names of its tensors are those of no known model, first {min(names, default='none')}; "
        "known are AscendSpeed's LLaMA and GPT models and Megatron-LM's GPTModel"
    )
