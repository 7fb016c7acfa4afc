"""An objective is chosen by the config and brings its own loss; the step knows none of them."""

from collections.abc import Sequence

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.finetune import FinetuneConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.preference import DpoConfig
from ascendspeed_core.config.training import PretrainConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.objectives.dpo import DirectPreferenceOptimization
from ascendspeed_core.objectives.next_token import NextToken, NextTokenLoss
from ascendspeed_core.objectives.objective import LoadFrozen, MicroBatchLoss, Objective, ObjectiveLoss
from ascendspeed_core.objectives.registry import OBJECTIVES, objective_of
from ascendspeed_core.objectives.sft import SupervisedFineTuning
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights, WeightSource
from core.training_cases import micro_batches
from support.models import tiny_config

ALONE = ParallelMesh(Device("cpu"), Layout())
OPTIONS = {"load": "model", "data_path": ("corpus",), "seq_length": 8, "train_iters": 1}


@pytest.mark.parametrize(
    ("config", "options", "objective"),
    [
        (PretrainConfig, {}, NextToken),
        (FinetuneConfig, {}, NextToken),
        (FinetuneConfig, {"is_instruction_dataset": True}, SupervisedFineTuning),
        (DpoConfig, {}, DirectPreferenceOptimization),
    ],
)
def test_a_config_names_its_objective(
    config: type[PretrainConfig], options: dict[str, object], objective: type[Objective]
) -> None:
    assert objective_of(load_config(config, None, OPTIONS | options)) is objective


def test_the_table_is_by_name() -> None:
    assert list(OBJECTIVES) == ["next_token", "sft", "dpo"]
    assert all(name == objective.name for name, objective in OBJECTIVES.items())


class SquaredLoss(NextTokenLoss):
    """The mean of squared losses of micro-batches: an objective that this package does not have."""

    def prepare(
        self, micro_batches: Sequence[MicroBatch], num_tokens: int | None = None
    ) -> tuple[int, MicroBatchLoss]:
        count, loss_of = super().prepare(micro_batches, num_tokens)
        return count, lambda number, logits: loss_of(number, logits).square()


class Squared(NextToken):
    """Plain text, and another loss."""

    name = "squared"

    def make_loss(self, model: Transformer, mesh: ParallelMesh, load_frozen: LoadFrozen) -> ObjectiveLoss:
        return SquaredLoss(model, mesh)


def test_another_objective_needs_nothing_of_the_step() -> None:
    config = tiny_config()
    batches = micro_batches(config.vocab_size, 0, ALONE, 4, masked=True)

    def unused(source: WeightSource) -> Transformer:
        raise AssertionError(source)

    found = {}
    for objective in (NextToken(), Squared()):
        model = load_model(InitialWeights(config, seed=5), ALONE, torch.float64)
        engine = NativeEngine(model, OptimizerConfig(lr=1e-3), ALONE)
        loss = objective.make_loss(model, ALONE, unused)
        each = []
        for batch in batches:
            count, loss_of = loss.prepare([batch])
            each.append(float(loss_of(0, engine.forward(batch.input).logits).detach()))
        result = train_step(model, engine, batches, ALONE, objective=loss)
        assert result.loss == pytest.approx(sum(each) / result.tokens, rel=1e-12)
        assert count < result.tokens
        found[objective.name] = each
    assert found["squared"] == pytest.approx([value**2 for value in found["next_token"]], rel=1e-12)


def test_a_loss_is_next_token_prediction_where_none_is_named() -> None:
    config = tiny_config()
    batches = micro_batches(config.vocab_size, 0, ALONE, 4, masked=True)
    results = []
    for named in (False, True):
        model = load_model(InitialWeights(config, seed=5), ALONE, torch.float64)
        engine = NativeEngine(model, OptimizerConfig(lr=1e-3), ALONE)
        loss = NextTokenLoss(model, ALONE) if named else None
        results.append(train_step(model, engine, batches, ALONE, objective=loss))
    assert results[0] == results[1]
