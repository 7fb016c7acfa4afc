"""Parameters whose gradients are summed over different groups of ranks, as those of experts and of the rest.

The made-up ones are rows of a bank in each layer, of which every rank of an axis `ep` holds some, as it would hold
experts. The ranks of a stage are `edp` x `ep`, so the bank's gradient is summed over `edp` only.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from ascendspeed_core.build import load_model, parameter_slices
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.sharding import Slice, chunk_range
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.optim.deepspeed import refuse_other_replicas
from ascendspeed_core.optim.engine import TensorShard
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.optim.optimizer import MasterOptimizer
from ascendspeed_core.parallel.collectives import gather_sequence
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights
from ascendspeed_data.errors import ConfigError
from core.training_cases import micro_batches
from support.models import tiny_config
from support.processes import WorkerPool

CONFIG = tiny_config()
BANK = (4, CONFIG.hidden_size)
STEPS = 4

LAYOUTS = [
    Layout(dp=2, ep=2),
    Layout(dp=4, ep=2),
    Layout(dp=4, ep=2, sharded_optimizer=True),
    Layout(dp=2, ep=2, sharded_optimizer=True),
    Layout(dp=2, ep=2, cp=2),
    Layout(dp=2, ep=2, tp=2, sequence_parallel=True),
    Layout(dp=2, ep=2, tp=2, sequence_parallel=True, sharded_optimizer=True),
    Layout(dp=2, ep=2, pp=2),
    Layout(
        dp=2,
        ep=2,
        pp=2,
        schedule="looped-bfs",
        layers_per_stage=1,
        early_reduction=True,
        sharded_optimizer=True,
    ),
    Layout(dp=4, tp=2),
]


def model_with_banks(layout: Layout) -> tuple[Transformer, ParallelMesh, dict[str, Slice]]:
    """A model whose norms before the MLP add what all rows of a bank, one in each layer, make of them."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(InitialWeights(CONFIG, seed=5), mesh, torch.float64)
    slices = dict(parameter_slices(model, mesh))
    group = mesh.group("ep")
    for number, layer in model.layers.items():
        rows = chunk_range(BANK[0], layout.ep, mesh.index("ep"))
        generator = torch.Generator().manual_seed(int(number))
        whole = torch.randn(BANK, generator=generator, dtype=torch.float64) * 0.1
        layer.register_parameter("bank", nn.Parameter(whole[rows].clone()))
        slices[f"layers.{number}.bank"] = Slice(
            BANK,
            (rows, slice(0, BANK[1])),
            tp_replicas=layout.tp,
            tp_replica=mesh.tp_rank,
            has_partial_gradient=layout.sequence_parallel,
            replica_axes=("edp",),
        )

        def add_bank(_: nn.Module, __: Any, out: torch.Tensor, layer: nn.Module = layer) -> torch.Tensor:
            bank = layer.bank
            assert isinstance(bank, nn.Parameter)
            rows = bank if group is None else gather_sequence(bank.unsqueeze(0), group)[0]
            return out + (out @ rows.T).sin() @ rows

        layer.get_submodule("mlp_norm").register_forward_hook(add_bank)
    return model, mesh, slices


Written = list[TensorShard]


def train(layout: Layout) -> tuple[list[float], list[float], Written]:
    """Losses, norms before clipping, and what this rank writes of a checkpoint after some steps."""
    model, mesh, slices = model_with_banks(layout)
    options = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip_grad=0.5)
    engine = NativeEngine(model, options, mesh, slices)
    losses, norms = [], []
    for step in range(STEPS):
        result = train_step(model, engine, micro_batches(CONFIG.vocab_size, step, mesh, 4, True), mesh)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return (
        losses,
        norms,
        [TensorShard(name, part, value.detach().clone()) for name, part, value in engine.checkpoint_shards()],
    )


def joined(ranks: list[Written]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint; every element must be written, and by one rank only."""
    whole: dict[str, torch.Tensor] = {}
    for name, part, value in (piece for written in ranks for piece in written):
        assert part is not None
        target = whole.setdefault(name, torch.full(part.shape, torch.nan, dtype=value.dtype))
        assert target[part.index].isnan().all(), f"{name} is written twice"
        target[part.index] = value
    for name, value in whole.items():
        assert not value.isnan().any(), f"a part of {name} is not written"
    return whole


@cache
def one_process(workers: WorkerPool) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    losses, norms, written = workers.run(train, 1, Layout())[0]
    return losses, norms, joined([written])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_equals_one_process(workers: WorkerPool, layout: Layout) -> None:
    want_losses, want_norms, want = one_process(workers)
    ranks = workers.run(train, layout.world_size, layout)
    for losses, norms, _ in ranks:
        assert losses == pytest.approx(want_losses, rel=1e-9)
        assert norms == pytest.approx(want_norms, rel=1e-9)
    got = joined([written for _, _, written in ranks])
    assert got.keys() == want.keys()
    assert sum("bank" in name for name in got) == 3 * CONFIG.num_layers
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)


def norm_and_overflow(layout: Layout) -> tuple[float | None, float | None, int]:
    """The norm of a gradient of ones, what a step says of an infinite element of one bank, and updates made."""
    model, mesh, slices = model_with_banks(layout)
    optimizer = MasterOptimizer(model, OptimizerConfig(clip_grad=0.0), mesh, slices)

    def fill() -> None:
        """Give each element a gradient of 1 on one of the ranks over which it is summed."""
        for name, parameter in model.named_parameters():
            part = slices[name]
            is_first = mesh.index(*part.replica_axes) == 0 and not (
                part.has_partial_gradient and part.tp_replica
            )
            parameter.grad = torch.full_like(parameter, float(is_first))

    fill()
    norm = optimizer.step(loss_scale=1.0)
    fill()
    if mesh.rank == layout.world_size - 1:
        gradient = next(p.grad for name, p in model.named_parameters() if name.endswith("bank"))
        assert gradient is not None
        gradient[-1, -1] = torch.inf
    return norm, optimizer.step(loss_scale=1.0), optimizer.num_steps


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_element_counts_once_and_an_overflow_everywhere(workers: WorkerPool, layout: Layout) -> None:
    elements = CONFIG.num_parameters + CONFIG.num_layers * BANK[0] * BANK[1]
    for norm, after_overflow, num_steps in workers.run(norm_and_overflow, layout.world_size, layout):
        assert norm == pytest.approx(elements**0.5, rel=1e-12)
        assert after_overflow is None
        assert num_steps == 1


def test_deepspeed_refuses_another_group_by_name() -> None:
    whole = (slice(0, 4),)
    slices = {"a": Slice((4,), whole), "layers.0.bank": Slice((4,), whole, replica_axes=("edp",))}
    refuse_other_replicas(slices, Layout(dp=4))
    with pytest.raises(
        ConfigError, match=r"layers\.0\.bank sums its gradient over edp, but DeepSpeed sums all of"
    ):
        refuse_other_replicas(slices, Layout(dp=4, ep=2))
