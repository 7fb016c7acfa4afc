"""Experts and latent attention under `--engine megatron`: with this project's routers, as one process of ours.

megatron-core asks for a GPU; `support.megatron_on_cpu` answers with the CPU, here and nowhere else.
"""

from typing import Any

import pytest

from ascendspeed_core.config.experts import Experts, ExpertsConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import RotaryScaling
from ascendspeed_core.config.training import RecomputeConfig
from core.megatron_comparison import OVERLAP, compare
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

MIXTRAL = {"count": 4, "per_token": 2, "ffn_hidden_size": 16}
QWEN = MIXTRAL | {
    "dense_layers": (0,),
    "shared_ffn_hidden_size": 24,
    "shared_gate": True,
    "normalised": False,
}
DEEPSEEK = MIXTRAL | {
    "count": 8, "per_token": 4, "score": "sigmoid", "score_bias": True, "groups": 4, "groups_per_token": 2,
    "scaling": 2.5, "shared_ffn_hidden_size": 24, "dense_layers": (0,),
}  # fmt: skip


DEEPSEEK_2 = MIXTRAL | {
    "count": 8, "per_token": 3, "groups": 4, "groups_per_token": 3, "group_score": "max", "normalised": False,
    "shared_ffn_hidden_size": 24, "dense_layers": (0,),
}  # fmt: skip
GLOBAL = ExpertsConfig(
    moe_aux_loss_coeff=1e-2, moe_router_load_balancing_type="global_aux_loss", moe_z_loss_coeff=1e-3,
    moe_router_bias_update_rate=1e-3,
)  # fmt: skip
BY_SEQUENCE = ExpertsConfig(moe_aux_loss_coeff=1e-2, moe_router_load_balancing_type="seq_aux_loss")
LIMITED = ExpertsConfig(moe_expert_capacity_factor=1.0)
SEQUENCE = {"tp": 2, "sequence_parallel": True}
INTERLEAVED = {"pp": 2, "schedule": "interleaved", "layers_per_stage": 1}


@pytest.mark.parametrize(
    ("what", "experts", "training", "layout"),
    [
        ("DeepSeek-V3's experts", DEEPSEEK, None, Layout(dp=2, ep=2, sharded_optimizer=True, **OVERLAP)),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (
                ("Mixtral", MIXTRAL, None, Layout(dp=2, ep=2)),
                ("Mixtral", MIXTRAL, None, Layout(**SEQUENCE, ep=2, etp=1)),
                ("Mixtral", MIXTRAL, GLOBAL, Layout(dp=2, pp=2, ep=2, sharded_optimizer=True)),
                ("Qwen's experts", QWEN, None, Layout(**SEQUENCE)),
                ("DeepSeek-V3's experts", DEEPSEEK, GLOBAL, Layout(dp=2, ep=2)),
            )
        ),
    ],
)
def test_experts(
    what: str,
    experts: dict[str, Any],
    training: ExpertsConfig | None,
    layout: Layout,
    workers: WorkerPool,
    megatron_workers: WorkerPool,
    report: ReportTables,
) -> None:
    config = tiny_config(experts=Experts(**experts))
    compare(layout, workers, megatron_workers, report, what, config=config, dtype="float32", experts=training)


@pytest.mark.parametrize(
    ("what", "training", "layout", "more"),
    [
        ("balance of the batch, biases that follow it", GLOBAL, Layout(**SEQUENCE, ep=2, etp=1), {}),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (
                ("balance of the batch, biases that follow it", GLOBAL, Layout(pp=2), {}),
                ("balance of the batch, biases that follow it", GLOBAL, Layout(**INTERLEAVED), {}),
                (
                    "the same, recomputed", GLOBAL, Layout(dp=2, ep=2),
                    {"recompute": RecomputeConfig(checkpoint_activations=True, checkpoint_policy="full")},
                ),
                ("balance of sequences", BY_SEQUENCE, Layout(**SEQUENCE), {}),
                ("balance of sequences", BY_SEQUENCE, Layout(dp=2, ep=2), {}),
                ("capacity", LIMITED, Layout(dp=2, ep=2), {}),
            )
        ),
    ],
)  # fmt: skip
def test_balance(
    what: str,
    training: ExpertsConfig,
    layout: Layout,
    more: dict[str, Any],
    workers: WorkerPool,
    megatron_workers: WorkerPool,
    report: ReportTables,
) -> None:
    """Losses of routers, their gradients, biases that follow the load, and what a capacity refuses."""
    config = tiny_config(experts=Experts(**DEEPSEEK))
    compare(layout, workers, megatron_workers, report, what, config=config, more=more, experts=training)


LATENT = {
    "kv_latent_dim": 16, "rotary_dim": 4, "head_dim": 12, "value_head_dim": 8, "num_key_value_heads": 8,
    "rotary_interleaved": True,
}  # fmt: skip
YARN = RotaryScaling(
    kind="yarn", factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7
)
DEEPSEEK_V3 = LATENT | {"q_latent_dim": 24, "rotary_scaling": YARN, "experts": Experts(**DEEPSEEK)}
DEEPSEEK_V2 = LATENT | {"experts": Experts(**DEEPSEEK_2)}
BIASED = LATENT | {"q_latent_dim": 24, "qkv_bias": True, "output_bias": True}


@pytest.mark.parametrize(
    ("what", "changes", "layout", "more"),
    [
        ("DeepSeek-V3", DEEPSEEK_V3, Layout(**SEQUENCE, pp=2), {}),
        *(
            pytest.param(*case, marks=pytest.mark.nightly)
            for case in (
                ("DeepSeek-V3", DEEPSEEK_V3, Layout(), {}),
                ("DeepSeek-V3", DEEPSEEK_V3, Layout(dp=2, ep=2), {}),
                ("DeepSeek-V3", DEEPSEEK_V3, Layout(**INTERLEAVED), {}),
                ("DeepSeek-V2", DEEPSEEK_V2, Layout(**SEQUENCE, ep=2, etp=1), {}),
                ("DeepSeek-V2", DEEPSEEK_V2, Layout(pp=2), {}),
                ("DeepSeek-V3", DEEPSEEK_V3, Layout(cp=2, ep=2), {}),
                ("latent attention with biases", BIASED, Layout(**SEQUENCE), {}),
                (
                    "latent attention, attention recomputed", LATENT, Layout(**SEQUENCE),
                    {"recompute": RecomputeConfig(checkpoint_activations=True, checkpoint_policy="attention")},
                ),
            )
        ),
    ],
)  # fmt: skip
def test_latent_attention(
    what: str,
    changes: dict[str, Any],
    layout: Layout,
    more: dict[str, Any],
    workers: WorkerPool,
    megatron_workers: WorkerPool,
    report: ReportTables,
) -> None:
    compare(layout, workers, megatron_workers, report, what, config=tiny_config(**changes), more=more)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", [Layout(pp=2), Layout(cp=2)], ids=str)
def test_latent_attention_inside_documents(
    layout: Layout, workers: WorkerPool, megatron_workers: WorkerPool, report: ReportTables
) -> None:
    """A layer that is recomputed gets the positions of its own micro-batch."""
    recompute = RecomputeConfig(checkpoint_activations=True, checkpoint_policy="full")
    compare(
        layout, workers, megatron_workers, report, "latent attention, documents, recompute full",
        config=tiny_config(**LATENT), more={"recompute": recompute}, documents=True,
    )  # fmt: skip
