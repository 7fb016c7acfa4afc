"""Recomputed activations give the same numbers, and are really not kept."""

from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout, PipelineSchedule
from ascendspeed_core.config.training import ComputeConfig, RecomputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import apply_recompute, recomputed_layers
from ascendspeed_core.weights import InitialWeights
from ascendspeed_data.errors import ConfigError
from core.test_layout_equality import HEADER, TITLE, TOLERANCE, differences, one_process
from core.training_cases import join_stages, train
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

ALONE = Layout()


def policy(name: str, **more: Any) -> RecomputeConfig:
    return RecomputeConfig(checkpoint_activations=True, checkpoint_policy=name, **more)


CASES = [
    (ALONE, policy("full")),
    (ALONE, policy("selective")),
    (Layout(tp=2, sequence_parallel=True), policy("full")),
    (Layout(tp=2, sequence_parallel=True), policy("selective")),
    (Layout(tp=2), policy("attention")),
    (Layout(tp=2, pp=2), policy("custom", recomputation_layer_num=(2, 1))),
    (Layout(pp=2, schedule="interleaved", layers_per_stage=1), policy("block", checkpoint_block_layer=1)),
    (Layout(pp=2, dp=2, sharded_optimizer=True), policy("full")),
]


@pytest.mark.parametrize(("layout", "config"), CASES, ids=str)
def test_training_is_the_same(
    workers: WorkerPool, report: ReportTables, layout: Layout, config: RecomputeConfig
) -> None:
    ranks = workers.run(
        train, layout.world_size, tiny_config(), layout, "float64", recompute=config, micro_batch_size=2
    )
    found = differences(join_stages(ranks, layout), one_process("float64", False, 128))
    report.add(TITLE, HEADER, f"{layout}, recompute {config.checkpoint_policy}", "float64", *found)
    assert all(value <= limit for value, limit in zip(found, TOLERANCE["float64"], strict=True)), found


@pytest.mark.parametrize("name", ["selective", "attention"])
def test_triangle_attention_is_recomputed_right(workers: WorkerPool, name: str) -> None:
    triangle = ComputeConfig(triangle_attn=True)
    (alone,) = workers.run(
        train,
        1,
        tiny_config(),
        ALONE,
        "float64",
        recompute=policy(name),
        compute=triangle,
        micro_batch_size=2,
    )
    found = differences(alone, one_process("float64", False, 128))
    assert all(value <= limit for value, limit in zip(found, TOLERANCE["float64"], strict=True)), found


def kept_bytes(config: RecomputeConfig) -> int:
    """Bytes of activations that the backward pass of one forward pass holds on to, weights left out."""
    mesh = ParallelMesh.create(Device("cpu"), ALONE)
    model = load_model(InitialWeights(tiny_config(), seed=1), mesh, torch.float32)
    apply_recompute(model, config, 0)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(ModelInput(torch.arange(48).view(2, 24))).logits
    size = sum(kept.values())
    logits.sum().backward()
    return size


def test_fewer_activations_are_kept() -> None:
    sizes = {
        "none": kept_bytes(RecomputeConfig()),
        "attention": kept_bytes(policy("attention")),
        "block": kept_bytes(policy("block", checkpoint_block_layer=2)),
        "full": kept_bytes(policy("full")),
    }
    assert sizes["none"] > sizes["attention"] > sizes["full"]
    assert sizes["none"] > sizes["block"] > sizes["full"]


def test_which_layers() -> None:
    config, mesh = tiny_config(num_layers=4), ParallelMesh.create(Device("cpu"), ALONE)
    model = load_model(InitialWeights(config, seed=1), mesh, torch.float32)

    def numbers(recompute: RecomputeConfig) -> list[str]:
        chosen = recomputed_layers(model, recompute, 0)
        return [name for name, layer in model.layers.items() if any(layer is other for other in chosen)]

    assert numbers(policy("full")) == ["0", "1", "2", "3"]
    assert numbers(policy("block", checkpoint_block_layer=2)) == ["0", "1"]
    assert numbers(policy("custom", recomputation_layer_num=(3,))) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"checkpoint_activations": False, "checkpoint_policy": "block"},
            "checkpoint_policy means nothing with checkpoint_activations=false",
        ),
        (
            {"memory_budget_gib": 1.0},
            "memory_budget_gib means nothing without --checkpoint-activations or --checkpoint-policy",
        ),
        (
            {"checkpoint_activations": True, "checkpoint_block_layer": 3},
            "checkpoint_block_layer=3 means nothing with checkpoint_policy=full",
        ),
        ({"checkpoint_activations": True, "checkpoint_policy": "custom"}, "give both or neither"),
        (
            {"checkpoint_activations": True, "recomputation_layer_num": (1,)},
            "checkpoint_policy=custom and recomputation_layer_num go together",
        ),
    ],
)
def test_options_that_contradict(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        RecomputeConfig(**options)


@pytest.mark.parametrize("name", ["full", "block", "selective", "attention", "auto"])
def test_a_policy_alone_means_recompute(name: str) -> None:
    alone, both = RecomputeConfig(checkpoint_policy=name), policy(name)
    assert alone.model_dump() == both.model_dump()
    assert alone.note == (
        f"recompute: policy {name} (--checkpoint-policy alone means --checkpoint-activations too)"
    )
    assert both.note is None
    assert RecomputeConfig().note is None


def test_numbers_that_do_not_fit_the_stages() -> None:
    with pytest.raises(ConfigError, match="has 1 numbers for 2 pipeline stages"):
        policy("custom", recomputation_layer_num=(1,)).check_pipeline("1f1b", [2, 2])
    with pytest.raises(ConfigError, match="asks for 3 layers in pipeline stage 1, which has 2"):
        policy("custom", recomputation_layer_num=(1, 3)).check_pipeline("1f1b", [2, 2])


@pytest.mark.parametrize("schedule", ["interleaved-zb", "zbv", "dualpipev"])
def test_selective_keeps_its_results_for_one_backward_pass(schedule: PipelineSchedule) -> None:
    with pytest.raises(
        ConfigError, match=f"checkpoint_policy=selective.*pipeline_schedule={schedule} takes two"
    ):
        policy("selective").check_pipeline(schedule, [2, 2])
    policy("full").check_pipeline(schedule, [2, 2])
    policy("selective").check_pipeline("interleaved", [2, 2])
