"""Cases that worker processes run: train a tiny model under megatron-core and report everything about it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ascendspeed_core.config.experts import ExpertsConfig
from ascendspeed_core.config.finetune import FinetuneConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.megatron import LayerOptions
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.preference import DpoConfig
from ascendspeed_core.config.training import LossScaleConfig, PretrainConfig, RecomputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.objectives.next_token import NextTokenLoss
from ascendspeed_core.optim.engine import Engine
from ascendspeed_core.optim.loss_scale import LossScale
from ascendspeed_core.optim.megatron.core import check_sharded_optimizer, prepare
from ascendspeed_core.optim.megatron.engine import MegatronEngine
from ascendspeed_core.optim.megatron.model import load_megatron_model
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.router_steps import train_routers
from ascendspeed_core.training.check_finite import check_finite
from ascendspeed_core.training.step import train_step
from ascendspeed_core.training.trainer import Trainer
from ascendspeed_core.training.validate import plan_run
from ascendspeed_core.weights import InitialWeights
from ascendspeed_data.errors import AscendSpeedError
from core.training_cases import Trained, join, micro_batches
from support import megatron_on_cpu


def train_megatron(
    config: ModelConfig,
    layout: Layout,
    dtype_name: str,
    steps: int = 10,
    micro_batch_size: int | Sequence[int] = 4,
    masked: bool = True,
    recompute: RecomputeConfig | None = None,
    scale: float = 1.0,
    documents: bool = False,
    more: dict[str, dict[str, Any]] | None = None,
    experts: ExpertsConfig | None = None,
    **optimizer_options: Any,
) -> Trained:
    """Train from seeded weights as `training_cases.train` does, under megatron-core."""
    megatron_on_cpu.install()
    mesh, more = ParallelMesh.create(Device("cpu"), layout), more or {}
    dtype = getattr(torch, dtype_name)
    fields = more.get("TransformerConfig", {})
    model = load_megatron_model(
        InitialWeights(config, seed=5),
        mesh,
        dtype,
        recompute or RecomputeConfig(),
        not isinstance(micro_batch_size, int),
        fields,
        LayerOptions((experts or ExpertsConfig()).moe_expert_capacity_factor),
    )
    train_routers(model, experts or ExpertsConfig())
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5}
    engine = MegatronEngine(model, OptimizerConfig(**(options | optimizer_options)), mesh, more)
    loss_scale = LossScale.create(LossScaleConfig(loss_scale=scale), is_fp16=scale != 1.0)
    losses, norms, auxiliary = [], [], []
    for step in range(steps):
        batches = micro_batches(config.vocab_size, step, mesh, micro_batch_size, masked, documents)
        result = train_step(model, engine, batches, mesh, loss_scale)
        losses.append(result.loss)
        norms.append(result.grad_norm)
        auxiliary.append(result.auxiliary_losses)
    return Trained(losses, norms, {}, written_weights(engine), auxiliary)


def written_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The weights as a checkpoint would hold them, put together on every rank."""
    mine = [(shard.name, shard.slice, shard.values.clone()) for shard in engine.checkpoint_shards()]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, [part for part in mine if part[0].startswith("model/")])
    by_name: dict[str, list[Any]] = {}
    for name, place, values in (part for of_rank in everything for part in of_rank):
        by_name.setdefault(name.removeprefix("model/"), []).append((place, values))
    return {name: join(pieces) for name, pieces in by_name.items()}


def weights_around_waiting(
    config: ModelConfig, layout: Layout
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """All weights of this rank after a step, and after waiting for them."""
    megatron_on_cpu.install()
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_megatron_model(
        InitialWeights(config, seed=5), mesh, torch.float32, RecomputeConfig(), False, {}
    )
    engine = MegatronEngine(model, OptimizerConfig(), mesh, {})
    train_step(model, engine, micro_batches(config.vocab_size, 0, mesh, 8, masked=False), mesh)
    before = [held.parameter.detach().clone() for held in model.held]
    engine.wait_for_parameters()
    return before, [held.parameter.detach().clone() for held in model.held]


def train_on_broken_weights(config: ModelConfig, layout: Layout) -> tuple[float | None, int, str, bool]:
    """A step on a weight that is no number: its norm, updates, what is said, and whether the rest is as it was."""
    megatron_on_cpu.install()
    mesh = ParallelMesh.create(Device("cpu"), layout)
    source = InitialWeights(config, seed=5)
    model = load_megatron_model(source, mesh, torch.float32, RecomputeConfig(), False, {})
    engine = MegatronEngine(model, OptimizerConfig(), mesh, {})
    broken = next(held for held in model.held if held.parts[0].name == "layers.1.mlp.down_proj.weight")
    broken.parameter.data[0, 0] = torch.nan
    before = [held.parameter.detach().clone() for held in model.held]
    batches = micro_batches(config.vocab_size, 0, mesh, 8, masked=False)
    result = train_step(model, engine, batches, mesh)
    objective = NextTokenLoss(model, mesh)
    try:
        check_finite(result, 1, model, engine, batches, mesh, None, objective)
        said = ""
    except AscendSpeedError as error:
        said = str(error)
    pairs = zip(model.held, before, strict=True)
    unchanged = all(torch.equal(held.parameter.nan_to_num(), own.nan_to_num()) for held, own in pairs)
    return result.grad_norm, engine.num_steps, said, unchanged


def megatron_version() -> str:
    """The version that this process finds."""
    megatron_on_cpu.install()
    return prepare(Device("cpu"))


def complaint_about_sharding() -> str:
    """What is said of the distributed optimizer; empty when nothing is."""
    megatron_on_cpu.install()
    try:
        check_sharded_optimizer()
    except AscendSpeedError as error:
        return str(error)
    return ""


CONFIGS = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "dpo": DpoConfig}


def trainer_of(options: dict[str, Any], command: str = "pretrain") -> Trainer:
    """The trainer of a run with these options, in this process group."""
    if options.get("engine") == "megatron":
        megatron_on_cpu.install()
    # The command makes it, for its lock.
    options["save"].mkdir(exist_ok=True)
    plan = plan_run(load_config(CONFIGS[command], None, options), dist.get_world_size())
    return Trainer(plan, ParallelMesh.create(Device("cpu"), plan.layout))


def train_run(options: dict[str, Any], command: str = "pretrain") -> None:
    """Train as a command does, under megatron-core if the options say so."""
    trainer_of(options, command).train()


def resave(options: dict[str, Any]) -> None:
    """Load a checkpoint, and save what was loaded."""
    trainer = trainer_of(options)
    assert trainer.writer is not None
    trainer._save(trainer.writer)
