"""Tiny models with experts, trained under layouts."""

from typing import Any

from ascendspeed_core.config.experts import Experts, ExpertsConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from core.training_cases import Trained, train
from support.models import tiny_config

EXPERTS: dict[str, Any] = {"count": 4, "per_token": 2, "ffn_hidden_size": 16}
BALANCED = ExpertsConfig(moe_aux_loss_coeff=0.05, moe_z_loss_coeff=0.02)


def experts_config(**changes: Any) -> ModelConfig:
    """A four-layer LLaMA whose first layer is dense, the others with four experts and a shared one."""
    experts = {**EXPERTS, "shared_ffn_hidden_size": 24, "shared_gate": True, "dense_layers": (0,), **changes}
    return tiny_config(experts=Experts(**experts))


def train_experts(layout: Layout, dtype: str = "float64", steps: int = 3, **options: Any) -> Trained:
    """A few steps of it, with losses of the routers; `changes` of its experts are pairs."""
    changes = dict(options.pop("changes", ()))
    return train(
        experts_config(**changes), layout, dtype, **({"experts": BALANCED, "steps": steps} | options)
    )
