"""A model whose layers differ and have losses of their own computes under every layout what one process computes."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.training import DropoutConfig, RecomputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.objectives.next_token import NextTokenLoss
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.step import forward_backward
from ascendspeed_core.verification.parity import Candidate, _compare
from ascendspeed_core.weights import InitialWeights
from core.test_layout_equality import differences
from core.training_cases import Trained, join_stages, micro_batches, train
from core.zero_cases import train_zero
from support.made_up_layers import balance, made_up_layers, router_z
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool

CONFIG = tiny_config(qk_norm=True)
NAMES = ("balance", "router_z")
CPU = ParallelMesh(Device("cpu"), Layout())
TOLERANCE = 1e-10
ADAPTERS = LoraConfig(lora_target_modules=("q_proj", "v_proj", "down_proj"), lora_r=3)


def recomputing(policy: str) -> RecomputeConfig:
    return RecomputeConfig(checkpoint_activations=True, checkpoint_policy=policy)  # type: ignore[arg-type]


def train_made_up(layout: Layout, dtype: str = "float64", **options: Any) -> Trained:
    """A few steps of the made-up model."""
    with made_up_layers():
        return train(CONFIG, layout, dtype, **({"steps": 3} | options))


def train_made_up_zero(layout: Layout, **options: Any) -> Trained:
    with made_up_layers():
        return train_zero(CONFIG, layout, "float32", steps=2, **options)


@cache
def one_process(**options: Any) -> Trained:
    torch.set_num_threads(1)
    return train_made_up(Layout(), **options)


def check(got: Trained, want: Trained) -> None:
    assert max(differences(got, want)) < TOLERANCE
    for ours, theirs in zip(got.auxiliary_losses, want.auxiliary_losses, strict=True):
        assert tuple(ours) == tuple(theirs) == NAMES
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=TOLERANCE)


FULL, SELECTIVE, ATTENTION = map(recomputing, ("full", "selective", "attention"))
CASES: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(tp=2), {}),
    (Layout(tp=2, sequence_parallel=True), {"recompute": FULL}),
    (Layout(cp=2), {}),
    (Layout(dp=2, sharded_optimizer=True), {"micro_batch_size": 2}),
    (Layout(pp=2), {"recompute": SELECTIVE}),
    (Layout(pp=2, schedule="interleaved-zb", layers_per_stage=1), {}),
    (Layout(pp=2, schedule="zbv"), {"recompute": FULL}),
    (Layout(tp=2, pp=2, sequence_parallel=True, schedule="dualpipev"), {}),
]
MORE_CASES: list[tuple[Layout, dict[str, Any]]] = [
    (Layout(pp=2, schedule="gpipe"), {}),
    (Layout(pp=2, schedule="looped-bfs", layers_per_stage=1), {"recompute": ATTENTION}),
    (Layout(pp=2, schedule="interleaved", layers_per_stage=1), {"micro_batch_size": (1, 5, 2, 8)}),
    (Layout(pp=2, schedule="interleaved-zb", layers_per_stage=1), {"recompute": FULL}),
    (Layout(pp=2, schedule="zbv"), {}),
    (Layout(pp=2, schedule="dualpipev"), {"recompute": ATTENTION}),
    (Layout(pp=4), {}),
    (Layout(tp=4, sequence_parallel=True), {}),
    (Layout(tp=2, cp=2), {"recompute": SELECTIVE}),
    (Layout(cp=2, pp=2, schedule="zbv"), {}),
    (Layout(pp=2, dp=2, schedule="looped-bfs", layers_per_stage=1, early_reduction=True), {}),
    (
        Layout(
            pp=2,
            dp=2,
            schedule="interleaved",
            layers_per_stage=1,
            early_reduction=True,
            sharded_optimizer=True,
        ),
        {},
    ),
    (Layout(tp=2, pp=2, dp=2, sequence_parallel=True, sharded_optimizer=True, schedule="zbv"), {}),
    (Layout(tp=2, pp=2, cp=2, sequence_parallel=True, sharded_optimizer=True), {"recompute": FULL}),
]


def ran(workers: WorkerPool, layout: Layout, **options: Any) -> Trained:
    options = {"micro_batch_size": 16 // (4 * layout.dp)} | options
    return join_stages(workers.run(train_made_up, layout.world_size, layout, **options), layout)


@pytest.mark.parametrize(("layout", "options"), CASES, ids=str)
def test_layouts(workers: WorkerPool, layout: Layout, options: dict[str, Any]) -> None:
    check(ran(workers, layout, **options), one_process())


@pytest.mark.nightly
@pytest.mark.parametrize(("layout", "options"), MORE_CASES, ids=str)
def test_more_layouts(workers: WorkerPool, layout: Layout, options: dict[str, Any]) -> None:
    check(ran(workers, layout, **options), one_process())


@pytest.mark.parametrize("policy", ["full", "selective", "attention"])
def test_recompute_counts_no_loss_twice(policy: str) -> None:
    check(train_made_up(Layout(), recompute=recomputing(policy)), one_process())


@pytest.mark.parametrize("size", [1, 16])
def test_gradient_accumulation(size: int) -> None:
    check(train_made_up(Layout(), micro_batch_size=size), one_process())


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2, schedule="zbv")], ids=str)
def test_scaled_losses(workers: WorkerPool, layout: Layout) -> None:
    """A power of two changes no bit but the exponents."""
    check(ran(workers, layout, scale=1024.0), one_process())


@pytest.mark.parametrize("layout", [Layout(pp=2, schedule="interleaved-zb", layers_per_stage=1)], ids=str)
def test_loading_adapters(workers: WorkerPool, layout: Layout) -> None:
    """What is frozen gets no gradient of the losses; what lies before does."""
    got, want = ran(workers, layout, lora=ADAPTERS), one_process(lora=ADAPTERS)
    assert all("lora_" in name for name in want.gradients)
    check(got, want)


def test_dropout(workers: WorkerPool) -> None:
    dropout = DropoutConfig(hidden_dropout=0.1)
    got = ran(workers, Layout(tp=2, sequence_parallel=True), dropout=dropout, recompute=FULL)
    check(got, one_process(dropout=dropout))
    assert got.auxiliary_losses != one_process().auxiliary_losses


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, zero_stage=2),
        pytest.param(Layout(dp=2, zero_stage=1), marks=pytest.mark.nightly),
        pytest.param(Layout(tp=2, dp=2, zero_stage=1), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_deepspeed(workers: WorkerPool, layout: Layout) -> None:
    """In fp32: the gradients of both engines, with the losses in them."""
    got = workers.run(train_made_up_zero, layout.world_size, layout)[0]
    (want,) = workers.run(train_made_up_zero, 1, Layout())
    losses, norms, gradients, _ = differences(got, want)
    assert max(losses, norms, gradients) < 1e-4


def test_the_step_by_hand() -> None:
    """The losses are sums over all tokens, divided like the main loss, and their gradients are in the step's."""
    (batch,) = micro_batches(CONFIG.vocab_size, 0, CPU, 16, masked=True)
    count = int(batch.loss_mask.sum())
    with made_up_layers():
        model = load_model(InitialWeights(CONFIG, seed=5), CPU, torch.float64)
    seen: dict[str, torch.Tensor] = {}
    for name in ("layers.1.attention", "layers.2.mlp", "layers.3.mlp"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.__setitem__(name, args[0])
        )
    output = model(batch.input)
    attention = model.get_submodule("layers.1.attention")
    by_hand = {
        "balance": balance(seen["layers.2.mlp"]) + balance(seen["layers.3.mlp"]),
        "router_z": router_z(seen["layers.1.attention"][..., : CONFIG.head_dim] * attention.k_norm.weight)
        + router_z(seen["layers.2.mlp"])
        + router_z(seen["layers.3.mlp"]),
    }
    assert output.auxiliary_losses.keys() == by_hand.keys()
    losses = F.cross_entropy(output.logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    main = (losses * batch.loss_mask.flatten()).sum() / count
    parameters = dict(model.named_parameters())
    want = torch.autograd.grad(
        main + sum(by_hand.values()) / count, list(parameters.values()), retain_graph=True
    )
    without = torch.autograd.grad(main, list(parameters.values()), allow_unused=True)

    engine = NativeEngine(model, OptimizerConfig(), CPU)
    num_tokens, loss_of = NextTokenLoss(model, CPU).prepare([batch])
    assert num_tokens == count
    sums = forward_backward(model, engine, [batch], CPU, count, loss_of)
    assert float(sums.loss) == pytest.approx(float(main), rel=1e-12)
    for name, value in by_hand.items():
        assert float(sums.auxiliary[name]) == pytest.approx(float(value) / count, rel=1e-12)
    changed = 0
    for parameter, with_losses, main_alone in zip(parameters.values(), want, without, strict=True):
        torch.testing.assert_close(parameter.grad, with_losses, rtol=1e-10, atol=1e-14)
        changed += main_alone is None or not torch.allclose(with_losses, main_alone, rtol=1e-3, atol=0)
    assert changed > len(parameters) / 2


def test_layers_differ() -> None:
    """Each layer has its own window and angles: the first sees no further than its window."""
    with made_up_layers():
        model = load_model(InitialWeights(CONFIG, seed=5), CPU, torch.float64)
    tokens = torch.randint(0, CONFIG.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    inputs = model.positions.attention_inputs(torch.arange(24)[None], torch.float64)
    windowed, latent, half, plain = (inputs[model._kind_index[number]] for number in range(4))
    assert windowed.mask is not None
    assert windowed.mask.dense.sum(-1).max() == 7
    assert latent.rotary is None
    assert half.rotary is not None
    assert plain.rotary is not None
    assert (half.rotary[0].shape[-1], plain.rotary[0].shape[-1]) == (2, 4)
    assert latent.mask is half.mask is plain.mask is None
    # What one layer of the stock model computes is another thing than what these compute.
    stock = load_model(InitialWeights(CONFIG, seed=5), CPU, torch.float64)
    with torch.no_grad():
        assert (model(ModelInput(tokens)).logits - stock(ModelInput(tokens)).logits).abs().max() > 1e-3
    assert stock(ModelInput(tokens)).auxiliary_losses == {}


def test_a_loss_that_no_class_states() -> None:
    """Other ranks would not know of it."""
    with made_up_layers():
        model = load_model(InitialWeights(CONFIG, seed=5), CPU, torch.float64)
    model.auxiliary_loss_names = ("balance",)
    with pytest.raises(ValueError, match="layer 1 returns the auxiliary loss 'router_z'"):
        model(ModelInput(torch.zeros(1, 4, dtype=torch.long)))


def test_parity_compares_auxiliary_losses(tmp_path: Path) -> None:
    """The worst of all losses is what it reports; one that a run lacks is infinitely far."""
    runs = [tmp_path / name for name in ("one", "same", "other", "lacking")]
    for run, loss in zip(runs, (0.5, 0.5, 0.6, None), strict=True):
        save_hugging_face(tiny_config(), run)
        record = {"iteration": 1, "lm_loss": 2.0, "grad_norm": 1.0, "auxiliary_losses/balance": loss}
        if loss is None:
            del record["auxiliary_losses/balance"]
        (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    found = [_compare(Candidate("x", {}), run, runs[0]).loss for run in runs[1:]]
    assert found == [0.0, pytest.approx(0.2), float("inf")]
