"""Cases that worker processes run: train with gradients reduced and parameters gathered early, and late."""

import gc
import time
import weakref
from dataclasses import dataclass, replace

import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.training import RecomputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel import collectives
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import apply_recompute
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights, WeightSource
from core.finetune_cases import used_adapters
from core.training_cases import micro_batches


@dataclass(frozen=True)
class Outcome:
    """What some steps computed on one rank, bit by bit.

    Attributes:
        losses: of each step.
        norms: of each step's gradient.
        weights: afterwards.
        state: of the optimizer.
        early: messages of gradients of the last step that started before its last backward was over.
        messages: of all gradients of a step.
        waiting: messages of parameters that were not waited for when a step returned.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    early: int
    messages: int
    waiting: int


def outcome(
    config: ModelConfig,
    layout: Layout,
    dtype_name: str,
    overlap: bool,
    lora: LoraConfig | None = None,
    recompute: bool = False,
    bucket_elements: int = 2000,
) -> Outcome:
    """Train for three steps, with the messages of a large model: summed by gloo, whose order goes by their parts."""
    layout = replace(
        layout, overlap_grad_reduce=overlap, overlap_param_gather=overlap, bucket_elements=bucket_elements
    )
    small, collectives.SMALL_ELEMENTS = collectives.SMALL_ELEMENTS, 0
    try:
        return _train(config, layout, dtype_name, lora, recompute)
    finally:
        collectives.SMALL_ELEMENTS = small


def _train(
    config: ModelConfig, layout: Layout, dtype_name: str, lora: LoraConfig | None, recompute: bool
) -> Outcome:
    mesh = ParallelMesh.create(Device("cpu"), layout)
    source: WeightSource = InitialWeights(config, seed=5)
    if lora is not None:
        source = used_adapters(source, lora)
    model = load_model(source, mesh, getattr(torch, dtype_name))
    apply_recompute(model, RecomputeConfig(checkpoint_activations=recompute), mesh.pp_rank)
    engine = NativeEngine(model, OptimizerConfig(lr=1e-2, clip_grad=0.5), mesh)
    reduction = engine.optimizer.reduction
    losses, norms, waiting, ended = [], [], 0, 0.0

    finish = reduction.finish

    def noting() -> dict[str, torch.Tensor]:
        """Note when the sums are asked for: all backwards are over."""
        nonlocal ended
        ended = time.perf_counter()
        return finish()

    reduction.finish = noting  # type: ignore[method-assign]
    for step in range(3):
        result = train_step(model, engine, micro_batches(config.vocab_size, step, mesh, 2, True), mesh)
        losses.append(result.loss)
        norms.append(result.grad_norm or 0.0)
        waiting = sum(bucket.gather is not None for bucket in reduction.buckets)
    engine.wait_for_parameters()
    return Outcome(
        losses,
        norms,
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        {name: value.clone() for name, (_, value) in engine.optimizer.state().items()},
        sum(one.start < ended for one in reduction.noted),
        len(reduction.noted),
        waiting,
    )


def parameters_kept_alive(config: ModelConfig, layout: Layout, dtype_name: str) -> list[str]:
    """Train a step, let go of everything, and return the parameters that are still there."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(InitialWeights(config, seed=5), mesh, getattr(torch, dtype_name))
    engine = NativeEngine(model, OptimizerConfig(lr=1e-2), mesh)
    train_step(model, engine, micro_batches(config.vocab_size, 0, mesh, 2, True), mesh)
    found = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    del model, engine
    gc.collect()
    return [name for name, kept in found.items() if kept() is not None]
