"""Cases that worker processes run: fine-tune under a layout and report everything about it."""

from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.config.finetune import FinetuneDataConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.parallel import Layout
from ascendspeed_core.config.training import ComputeConfig, OptimizerConfig
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.dispatch import apply_kernels
from ascendspeed_core.parallel.build import load_model, parameter_slices
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.instruction import InstructionData
from ascendspeed_core.training.optimizer import MasterOptimizer
from ascendspeed_core.training.step import evaluate, train_step
from ascendspeed_core.weights import InitialWeights
from core.training_cases import Trained, first_gradients, whole

BATCH = 8


def data_config(prefix: Path, length: int, **changes: Any) -> FinetuneDataConfig:
    """Options of an instruction set."""
    values: dict[str, Any] = {
        "data_path": (str(prefix),), "split": "80,20,0", "seq_length": length, "is_instruction_dataset": True,
    }  # fmt: skip
    return FinetuneDataConfig(**(values | changes))


def tune(
    config: ModelConfig,
    layout: Layout,
    data: FinetuneDataConfig,
    dtype_name: str = "float64",
    steps: int = 4,
    micro_batch_size: int = 2,
    attention: str = "sdpa",
) -> Trained:
    """Train all weights; return losses with the held-out loss behind them, norms, first gradients and weights."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(InitialWeights(config, seed=5), mesh, getattr(torch, dtype_name))
    apply_kernels(model, ComputeConfig(attention=attention))
    samples = InstructionData(data, 7, (steps * BATCH, BATCH, 0), config.vocab_size, mesh)
    sizes = (micro_batch_size,) * (BATCH // micro_batch_size // layout.dp)
    gradients = first_gradients(model, samples.micro_batches(0, sizes), mesh)
    optimizer = MasterOptimizer(model, OptimizerConfig(lr=1e-3, clip_grad=0.5), mesh)
    losses, norms = [], []
    for step in range(steps):
        result = train_step(model, optimizer, samples.micro_batches(step * BATCH, sizes), mesh)
        losses.append(result.loss)
        norms.append(result.grad_norm or 0.0)
    losses.append(evaluate(model, samples.validation_batches(0, sizes), mesh))
    slices = parameter_slices(model, mesh)
    weights = {name: whole(p, slices[name], mesh.group("tp")) for name, p in model.named_parameters()}
    return Trained(losses, norms, gradients, weights)
