"""Cases that worker processes run: tune on pairs under a layout and report everything about it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.build import apply_kernels, load_model, parameter_slices
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.preference import PreferenceConfig, PreferenceDataConfig
from ascendspeed_core.config.training import ComputeConfig, RecomputeConfig
from ascendspeed_core.data.padded_dataset import PaddedBatchLoader
from ascendspeed_core.data.preference_dataset import PREFERENCE_FORMAT
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.registry import KernelContext
from ascendspeed_core.objectives.dpo import PreferenceLoss
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import apply_recompute
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights
from core.finetune_cases import used_adapters
from core.training_cases import Trained, first_gradients, whole

PAIRS = 8
"""Pairs of a step."""
POLICY_SEED, REFERENCE_SEED = 5, 6


@dataclass(frozen=True)
class Tuned:
    """What a layout computed, with the measures of every step and of held-out pairs."""

    trained: Trained
    measures: list[dict[str, float]]


def data_config(prefix: Path, length: int, **changes: Any) -> PreferenceDataConfig:
    """Options of pairs."""
    values: dict[str, Any] = {"data_path": (str(prefix),), "split": "80,20,0", "seq_length": length}
    return PreferenceDataConfig(**(values | changes))


def tune(
    config: ModelConfig,
    layout: Layout,
    data: PreferenceDataConfig,
    preference: PreferenceConfig,
    micro_batch_size: int = 2,
    recompute: RecomputeConfig | None = None,
    lora: LoraConfig | None = None,
    is_switched: bool = True,
    steps: int = 4,
    compute: ComputeConfig | None = None,
) -> Tuned:
    """Train all weights in float64, compared with another model; or adapters, compared with their base.

    The base is the model without its adapters, or, not `is_switched`, a second model.
    """
    mesh = ParallelMesh.create(Device("cpu"), layout)
    base = InitialWeights(config, POLICY_SEED)
    model = load_model(base if lora is None else used_adapters(base, lora), mesh, torch.float64)
    other = InitialWeights(config, REFERENCE_SEED) if lora is None else base
    reference = None if lora and is_switched else load_model(other, mesh, torch.float64)
    for one in (model, reference):
        if one is not None:
            apply_kernels(one, compute or ComputeConfig(), KernelContext(dtype=torch.float64, tp=layout.tp))
    apply_recompute(model, recompute or RecomputeConfig(), mesh.pp_rank)
    objective = PreferenceLoss(model, reference, preference, mesh)
    pairs = PaddedBatchLoader(PREFERENCE_FORMAT, data, 7, (steps * PAIRS, PAIRS, 0), config.vocab_size, mesh)
    sizes = (micro_batch_size,) * (PAIRS // micro_batch_size // layout.dp)
    gradients = first_gradients(model, pairs.micro_batches(0, sizes), mesh, objective)
    engine = NativeEngine(model, OptimizerConfig(lr=1e-3, clip_grad=0.5), mesh)
    losses, norms, measures = [], [], []
    for step in range(steps):
        batches = pairs.micro_batches(step * PAIRS, sizes)
        result = train_step(model, engine, batches, mesh, objective=objective)
        losses.append(result.loss)
        norms.append(result.grad_norm or 0.0)
        measures.append(objective.metrics())
    held_out = objective.evaluate(pairs.validation_batches(0, sizes))
    losses.append(held_out["loss"])
    measures.append(held_out)
    assert reference is None or all(parameter.grad is None for parameter in reference.parameters())
    slices = parameter_slices(model, mesh)
    weights = {name: whole(p, slices[name], mesh.group("tp")) for name, p in model.named_parameters()}
    return Tuned(Trained(losses, norms, gradients, weights), measures)
