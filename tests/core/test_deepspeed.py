"""Training under DeepSpeed's ZeRO computes what one process without it computes."""

import os
import sys

import pytest
import torch

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.training import RecomputeConfig
from core.training_cases import Trained, train
from core.zero_cases import held, resident_while_loading, train_zero, validation_loss
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

# DeepSpeed keeps master weights and norms in fp32, so float64 would show nothing more. A large epsilon keeps AdamW
# from turning rounding of near-zero gradients into whole steps; what is left is the order of sums in fp32.
EPSILON = 1e-3
LAYOUTS = [
    Layout(dp=2, zero_stage=1),
    Layout(dp=2, zero_stage=2),
    Layout(dp=2, zero_stage=3),
    Layout(tp=2, dp=2, zero_stage=1),
    Layout(tp=2, dp=2, zero_stage=2),
    Layout(tp=2, dp=2, zero_stage=3),
]


@pytest.fixture(scope="module")
def one(workers: WorkerPool) -> Trained:
    return workers.run(train, 1, tiny_config(), Layout(), "float32", adam_eps=EPSILON)[0]


def far(ours: Trained, theirs: Trained) -> tuple[float, float, float, float]:
    """Largest relative differences of losses, norms, first gradients, and weights."""

    def numbers(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))

    def tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        assert a.keys() == b.keys()
        return max(float((a[n].double() - b[n].double()).abs().max() / b[n].abs().max()) for n in b)

    return (
        numbers(ours.losses, theirs.losses),
        numbers(ours.norms, theirs.norms),
        tensors(ours.gradients, theirs.gradients),
        tensors(ours.weights, theirs.weights),
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ten_steps_equal_one_process(
    layout: Layout, one: Trained, workers: WorkerPool, report: ReportTables
) -> None:
    ranks = workers.run(train_zero, layout.world_size, tiny_config(), layout, "float32", adam_eps=EPSILON)
    differences = far(ranks[0], one)
    report.add(
        "Ten steps under DeepSpeed, float32: largest relative difference to one process without it",
        ("layout", "losses", "gradient norms", "gradients of the first step", "weights after"),
        str(layout),
        *differences,
    )
    assert max(differences) < 2e-5
    assert all(rank.losses == ranks[0].losses for rank in ranks)


def test_bf16(workers: WorkerPool, report: ReportTables) -> None:
    """Against our own optimizer in bf16, which keeps fp32 master weights and gradients too."""
    config = tiny_config(num_layers=2)
    (own,) = workers.run(train, 1, config, Layout(), "bfloat16", adam_eps=EPSILON)
    for layout in (*LAYOUTS[:4], LAYOUTS[5]):
        ranks = workers.run(train_zero, layout.world_size, config, layout, "bfloat16", adam_eps=EPSILON)
        differences = far(ranks[0], own)
        title = "Ten steps under DeepSpeed in bf16: largest relative difference to one process without it"
        header = ("layout", "losses", "gradient norms", "gradients of the first step", "weights after")
        report.add(title, header, str(layout), *differences)
        # Each micro-batch's gradients are rounded to bf16, of which 2**-8 is the step; losses are means of many.
        assert max(differences[:2]) < 2e-3
        assert max(differences[2:]) < 3e-2
        assert all(rank.losses == ranks[0].losses for rank in ranks)


def test_a_head_that_remembers_its_rows_notices_updates(workers: WorkerPool) -> None:
    """Fused optimizers and DeepSpeed change weights without torch's counter of changes, by which the normalised head
    knows them."""
    config = tiny_config(num_layers=2, normalised_head=True)
    expected = workers.run(validation_loss, 1, config, Layout())[0]
    assert expected[2] < expected[0] - 0.01
    for stage in (2, 3):
        found = workers.run(validation_loss, 2, config, Layout(dp=2, zero_stage=stage))[0]
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_recomputed_layers(policy: str, one: Trained, workers: WorkerPool) -> None:
    recompute = RecomputeConfig(checkpoint_activations=True, checkpoint_policy=policy)
    layout = Layout(dp=2, zero_stage=3)
    ranks = workers.run(
        train_zero, 2, tiny_config(), layout, "float32", recompute=recompute, adam_eps=EPSILON
    )
    assert max(far(ranks[0], one)) < 2e-5


def test_norms_inside_the_cut(workers: WorkerPool) -> None:
    """Each tensor-parallel device sees its own heads only, so that the norms' gradients are added up over them."""
    config = tiny_config(num_layers=2, qk_norm=True, tie_word_embeddings=True)
    (own,) = workers.run(train, 1, config, Layout(), "float32", adam_eps=EPSILON)
    for stage in (1, 3):
        layout = Layout(tp=2, zero_stage=stage)
        ranks = workers.run(train_zero, 2, config, layout, "float32", adam_eps=EPSILON)
        assert max(far(ranks[0], own)) < 2e-5


def test_parts_of_a_sequence(one: Trained, workers: WorkerPool) -> None:
    """Devices with other parts of a sequence hold the same weights, so ZeRO cuts over them too."""
    for layout in (Layout(cp=2, zero_stage=2), Layout(dp=2, cp=2, zero_stage=3)):
        ranks = workers.run(train_zero, layout.world_size, tiny_config(), layout, "float32", adam_eps=EPSILON)
        assert max(far(ranks[0], one)) < 2e-5, layout


def test_frozen_weights_have_no_optimizer_state(workers: WorkerPool) -> None:
    """LoRA, one module trained whole: frozen weights are spread by ZeRO-3, and in no checkpoint."""
    config = tiny_config(num_layers=2, qkv_bias=True)
    lora = LoraConfig(
        lora_target_modules=("q_proj", "o_proj"), lora_r=4, lora_modules_to_save=("embed_tokens",)
    )
    (own,) = workers.run(train_zero, 1, config, Layout(), "float32", lora=lora, adam_eps=EPSILON)
    assert all(".lora_" in name or name == "embedding.weight" for name in own.weights)
    for layout in (*LAYOUTS[:3], LAYOUTS[3], LAYOUTS[5]):
        ranks = workers.run(
            train_zero, layout.world_size, config, layout, "float32", lora=lora, adam_eps=EPSILON
        )
        assert max(far(ranks[0], own)) < 2e-5, layout


LARGER = tiny_config(
    vocab_size=2048, hidden_size=768, ffn_hidden_size=2048, head_dim=96, num_key_value_heads=8, num_layers=8
)
STAGES = (1, 2, 3)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")


@on_linux
def test_no_process_holds_the_whole_model_while_it_is_read() -> None:
    """By what is resident, in new processes.

    Every tensor is a mapping of its own there: otherwise the C library keeps freed ones between others, in amounts
    that differ from run to run, and what is resident says little of what is held.
    """
    pool = WorkerPool("spawn")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        ranks = pool.run(resident_while_loading, 2, LARGER, Layout(dp=2, zero_stage=3))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        pool.close()
    # Half of the 228 MiB, the largest weight (a 36th) as it is drawn and as it is spread, and modules imported late.
    assert max(ranks) < 0.7


@pytest.mark.nightly
def test_memory_by_stage(workers: WorkerPool, report: ReportTables) -> None:
    """What ZeRO is for: master weights and moments, gradients, and weights are cut by dp, stage after stage."""
    dp = 4
    table = {}
    for layout in (
        Layout(dp=dp),
        Layout(dp=dp, sharded_optimizer=True),
        *(Layout(dp=dp, zero_stage=s) for s in STAGES),
    ):
        ranks = workers.run(held, dp, LARGER, layout, 2)
        loading, training, between = (max(rank[kind] for rank in ranks) for kind in range(3))
        table[str(layout)] = (loading, training, between)
        report.add(
            f"Tensors of a rank, dp {dp}, fp32, in bytes of the {LARGER.num_parameters:,} weights",
            ("layout", "most while loading", "most while training", "between steps"),
            str(layout), f"{loading:.2f}", f"{training:.2f}", f"{between:.2f}",
        )  # fmt: skip
    plain, own, one, two, three = table.values()
    # Weights and two moments; own and ZeRO-1 and 2 cut the moments, the latter with a copy of the weights to update;
    # ZeRO-3 cuts the weights too, and keeps its share of the gradients.
    kept = (3, 1 + 2 / dp, 1 + 3 / dp, 1 + 3 / dp, 5 / dp)
    for found, expected in zip(table.values(), kept, strict=True):
        assert found[2] == pytest.approx(expected, abs=0.05)
    assert max(stage[0] for stage in (plain, own, one, two)) < 1.05
    # A share, and the largest weight (a 36th) as it is drawn, as it is handed over, and as it is spread.
    assert three[0] < 1 / dp + 3 / 36
    assert three[1] < two[1] < one[1] < plain[1]
    assert own[1] < plain[1]
