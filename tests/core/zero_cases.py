"""Cases that worker processes run: train a tiny model under DeepSpeed and report everything about it."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ascendspeed_core.build import load_model, parameter_slices
from ascendspeed_core.config.deepspeed import RunValues, engine_settings
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.training import PretrainConfig, RecomputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.objectives.next_token import NextTokenLoss, evaluate
from ascendspeed_core.optim.deepspeed import ZeroEngine
from ascendspeed_core.optim.engine import Engine
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.deepspeed import start_deepspeed
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import apply_recompute
from ascendspeed_core.planner.fit_memory import LiveBytes
from ascendspeed_core.training.step import forward_backward, train_step
from ascendspeed_core.training.trainer import Trainer
from ascendspeed_core.training.validate import plan_run
from ascendspeed_core.weights import InitialWeights, WeightSource
from ascendspeed_core.weights.adapters.lora import drawn_adapters, plan_adapters
from core.training_cases import Trained, join, micro_batches, whole
from support.models import tiny_config


def settings_of(
    layout: Layout, dtype_name: str, clip_grad: float = 0.5, largest_unit: int = 20_000
) -> dict[str, Any]:
    """What the run would tell DeepSpeed."""
    run = RunValues(
        micro_batch_size=4, global_batch_size=16, dp=layout.dp, zero_stage=layout.zero_stage or 0, dtype=dtype_name,
        clip_grad=clip_grad, optimizer="adam", lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, loss_scale=0,
        initial_scale_power=32, loss_scale_window=1000, hysteresis=2, min_loss_scale=1,
    )  # fmt: skip
    return engine_settings({}, run, 100_000, largest_unit)


def number_afresh() -> None:
    """Start DeepSpeed's numbers of modules and parameters at 0: processes of the pool have counted differently far,
    and it compares them between ranks."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    (counter,) = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    counter[0] = 0
    Init.param_id = 0


def train_zero(
    config: ModelConfig,
    layout: Layout,
    dtype_name: str,
    steps: int = 10,
    micro_batch_size: int = 4,
    recompute: RecomputeConfig | None = None,
    lora: LoraConfig | None = None,
    documents: bool = False,
    **optimizer_options: Any,
) -> Trained:
    """Train from seeded weights as `training_cases.train` does, under DeepSpeed if the layout says so."""
    from deepspeed.utils import safe_get_full_grad

    number_afresh()
    mesh = ParallelMesh.create(Device("cpu"), layout)
    settings = settings_of(layout, dtype_name)
    # Weights below this size would stay whole on every process.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    weights: WeightSource = InitialWeights(config, seed=5)
    if lora is not None:
        weights = drawn_adapters(weights, plan_adapters(lora, config, ""), seed=3)
    model = load_model(weights, mesh, getattr(torch, dtype_name), zero_settings=settings)
    apply_recompute(model, recompute or RecomputeConfig(), mesh.pp_rank)
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5}
    slices = parameter_slices(model, mesh)
    optimizer = OptimizerConfig(**(options | optimizer_options))
    make = partial(ZeroEngine, settings=settings) if layout.zero_stage else NativeEngine
    engine: Engine = make(model, optimizer, mesh)
    batches = micro_batches(config.vocab_size, 0, mesh, micro_batch_size, masked=True, documents=documents)
    first = forward_backward(model, engine, batches, mesh, *NextTokenLoss(model, mesh).prepare(batches))
    gradients = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        gradient = safe_get_full_grad(parameter).double().view(slices[name].sizes)
        gradients[name] = whole(gradient, slices[name], mesh.group("tp"))
    losses, norms = [float(mesh.sum_over("replicas", first.loss))], [engine.step()]
    for step in range(1, steps):
        batches = micro_batches(
            config.vocab_size, step, mesh, micro_batch_size, masked=True, documents=documents
        )
        result = train_step(model, engine, batches, mesh)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    return Trained(losses, norms, gradients, written_weights(engine))


def written_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The weights as a checkpoint would hold them, put together from what all processes write."""
    mine = [(name, part, value.detach().clone()) for name, part, value in engine.checkpoint_shards()]
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    pieces: dict[str, list[Any]] = {}
    for name, part, value in (piece for of_rank in everything for piece in of_rank):
        if name.startswith("model/"):
            pieces.setdefault(name.removeprefix("model/"), []).append((part, value))
    return {name: join(found) for name, found in pieces.items()}


def validation_loss(config: ModelConfig, layout: Layout) -> list[float]:
    """Losses of one batch before and after some updates, without gradients; without DeepSpeed too."""
    number_afresh()
    mesh = ParallelMesh.create(Device("cpu"), layout)
    settings = settings_of(layout, "float32")
    model = load_model(InitialWeights(config, seed=5), mesh, torch.float32, zero_settings=settings)
    engine: Engine = NativeEngine(model, OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=0.5), mesh)
    if layout.zero_stage:
        engine = ZeroEngine(model, OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=0.5), mesh, settings)
    held_out = micro_batches(config.vocab_size, 99, mesh, 4, masked=True)
    losses = []
    for step in range(3):
        losses.append(evaluate(model, held_out, mesh))
        model.output_head._kept = None
        assert evaluate(model, held_out, mesh) == losses[-1], (
            "the head's lengths were those of an earlier weight"
        )
        train_step(model, engine, micro_batches(config.vocab_size, step, mesh, 4, masked=True), mesh)
    return losses


def resident_while_loading(config: ModelConfig, layout: Layout) -> float:
    """Most resident bytes while loading, beyond what is there before; for fresh processes.

    In shares of the bytes of the whole model's weights.
    """
    mesh = ParallelMesh.create(Device("cpu"), layout)
    settings = settings_of(layout, "float32", largest_unit=config.vocab_size * config.hidden_size)
    # Modules are imported before, since they take memory too: those of DeepSpeed, and those that loading needs.
    start_deepspeed(mesh.device)
    load_model(InitialWeights(tiny_config(), seed=5), mesh, torch.float32, zero_settings=settings)
    whole = config.num_parameters * 4

    def resident(line: str) -> float:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{line}:\s+(\d+) kB", status)[1]) * 1024 / whole  # type: ignore[index]

    before = resident("VmRSS")
    # Linux: makes the peak that of the time from here.
    Path("/proc/self/clear_refs").write_text("5")
    model = load_model(InitialWeights(config, seed=5), mesh, torch.float32, zero_settings=settings)
    assert model.layers
    return resident("VmHWM") - before


def held(config: ModelConfig, layout: Layout, steps: int) -> tuple[float, float, float]:
    """Most bytes of tensors while loading and while training, and bytes between steps.

    In shares of the bytes of the whole model's weights.
    """
    mesh = ParallelMesh.create(Device("cpu"), layout)
    settings = settings_of(layout, "float32", largest_unit=config.vocab_size * config.hidden_size)
    whole = config.num_parameters * 4
    with LiveBytes() as live:
        model = load_model(InitialWeights(config, seed=5), mesh, torch.float32, zero_settings=settings)
        loading, live.peak = live.peak, 0
        engine: Engine = NativeEngine(model, OptimizerConfig(), mesh)
        if layout.zero_stage:
            engine = ZeroEngine(model, OptimizerConfig(), mesh, settings)
        for step in range(steps):
            train_step(model, engine, micro_batches(config.vocab_size, step, mesh, 2, masked=False), mesh)
        return loading / whole, live.peak / whole, live.now / whole


def trainer_of(options: dict[str, Any]) -> Trainer:
    """The trainer of a run with these options, in this process group."""
    number_afresh()
    # The command makes it, for its lock.
    options["save"].mkdir(exist_ok=True)
    plan = plan_run(load_config(PretrainConfig, None, options), dist.get_world_size())
    return Trainer(plan, ParallelMesh.create(Device("cpu"), plan.layout))


def train_run(options: dict[str, Any]) -> None:
    """Train as `asd-core pretrain` does."""
    trainer_of(options).train()


def resave(options: dict[str, Any]) -> None:
    """Load a checkpoint, and save what was loaded."""
    trainer = trainer_of(options)
    assert trainer.writer is not None
    trainer._save(trainer.writer)
