"""Which implementation of an operator a run uses: chosen once, and said."""

from dataclasses import dataclass

import torch

from ascendspeed_core.config.training import ComputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.adamw import adamw_implementation
from ascendspeed_core.kernels.reference import reference_attention
from ascendspeed_core.kernels.triangle import triangle_attention
from ascendspeed_core.models.attention import Attention, AttentionFunction, causal_attention
from ascendspeed_core.models.transformer import Transformer

ATTENTION: dict[str, AttentionFunction] = {
    "sdpa": causal_attention,
    "triangle": triangle_attention,
    "reference": reference_attention,
}
"""Implementations of attention by name; all give what `reference` gives."""


@dataclass(frozen=True)
class Choice:
    """One row of the table that a run prints at its start."""

    operator: str
    implementation: str
    reason: str


def apply_kernels(model: Transformer, config: ComputeConfig) -> list[Choice]:
    """Give the layers of this process the implementations that `config` asks for, in place."""
    name = config.attention_name
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = ATTENTION[name]
    asked = "asked for" if config.asked_for_attention else "torch's own, which takes the device's fused one"
    return [Choice("attention", name, asked)]


def update_choice(optimizer: str, device: Device, dtype: torch.dtype) -> Choice:
    """Return the row of the optimizer's kernel.

    Args:
        optimizer: `adam`, `fused_adam` or `sgd`.
        device: of the weights.
        dtype: of the model; 16-bit weights are updated in fp32.
    """
    if optimizer == "sgd":
        return Choice("sgd", "fused", "torch's kernel, all tensors in one call in place")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    chosen = adamw_implementation(optimizer, device, wide)
    return Choice("adamw", chosen.name, chosen.reason)
