"""megatron-core's engine on the device beside this project's: ten steps from the same weights, and a step to time."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ascendspeed_core.build import apply_kernels, kernel_context, load_model
from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.training import ComputeConfig, RecomputeConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.optim.megatron.core import prepare
from ascendspeed_core.optim.megatron.engine import MegatronEngine
from ascendspeed_core.optim.megatron.model import choose_kernels, load_megatron_model
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights
from ascendspeed_data.errors import AscendSpeedError
from on_device.setting import LeftOut, Setting, check_within
from on_device.training_checks import LENGTH, PLAIN, STEPS, TOLERANCE

Step = Callable[[list[MicroBatch]], tuple[float, float | None]]
"""Micro-batches -> loss and gradient norm of a step."""


def check(setting: Setting, dtype: str) -> dict[str, Any]:
    """Compare losses and gradient norms of ten steps."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(PLAIN.vocab_size, (STEPS, 4, LENGTH + 1), generator=generator)
    mask = torch.ones(4, LENGTH)
    batches = [MicroBatch(own[:, :-1], own[:, 1:], mask).to(setting.device.torch) for own in ids]
    steps = [make(setting, PLAIN, dtype, LENGTH) for make in (megatron_step, our_step)]
    theirs, ours = ([step([one]) for one in batches] for step in steps)
    largest = {
        name: max(abs(a[at] - b[at]) / b[at] for a, b in zip(theirs, ours, strict=True))
        for at, name in enumerate(("loss", "norm"))
    }
    check_within(largest, TOLERANCE[dtype])
    return {**largest, "first loss": ours[0][0], "last loss": ours[-1][0]}


def our_step(setting: Setting, config: ModelConfig, dtype: str, length: int) -> Step:
    """Return a step of this project's engine."""
    mesh = setting.mesh
    model = load_model(InitialWeights(config, 1), mesh, getattr(torch, dtype))
    apply_kernels(
        model, ComputeConfig(), kernel_context(model, mesh, length, BatchConfig(micro_batch_size=4))
    )
    engine = NativeEngine(model, OptimizerConfig(), mesh)

    def step(batches: list[MicroBatch]) -> tuple[float, float | None]:
        result = train_step(model, engine, batches, mesh)
        return result.loss, result.grad_norm

    return step


def megatron_step(setting: Setting, config: ModelConfig, dtype: str, length: int) -> Step:
    """Return a step of megatron-core's engine."""
    mesh = setting.mesh
    try:
        prepare(mesh.device)
    except AscendSpeedError as error:
        raise LeftOut(str(error)) from None
    if not dist.is_initialized():
        alone = dist.HashStore()  # type: ignore[attr-defined] # public, but not listed
        dist.init_process_group(mesh.device.backend, store=alone, rank=0, world_size=1)
    weights = InitialWeights(config, 1)
    model = load_megatron_model(weights, mesh, getattr(torch, dtype), RecomputeConfig(), False, {})
    choose_kernels(
        model, ComputeConfig(), kernel_context(model, mesh, length, BatchConfig(micro_batch_size=4))
    )
    engine = MegatronEngine(model, OptimizerConfig(), mesh, {})

    def step(batches: list[MicroBatch]) -> tuple[float, float | None]:
        result = train_step(model, engine, batches, mesh)
        return result.loss, result.grad_norm

    return step
