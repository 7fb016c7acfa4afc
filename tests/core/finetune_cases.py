"""Cases that worker processes run: fine-tune under a layout and report everything about it."""

from pathlib import Path
from typing import Any

import torch

from ascendspeed_core.build import load_model, parameter_slices
from ascendspeed_core.config.finetune import FinetuneDataConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.training import DropoutConfig, RecomputeConfig
from ascendspeed_core.data.padded_dataset import PaddedBatchLoader
from ascendspeed_core.data.sft_dataset import SFT_FORMAT
from ascendspeed_core.device import Device
from ascendspeed_core.objectives.next_token import evaluate
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.dropout import apply_dropout
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import apply_recompute
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import Index, InitialWeights, WeightSource, open_weights
from ascendspeed_core.weights.adapters.lora import AdaptedWeights, drawn_adapters, plan_adapters
from core.training_cases import Trained, first_gradients, whole

BATCH = 8


def data_config(prefix: Path, length: int, **changes: Any) -> FinetuneDataConfig:
    """Options of an instruction set."""
    values: dict[str, Any] = {
        "data_path": (str(prefix),), "split": "80,20,0", "seq_length": length, "is_instruction_dataset": True,
    }  # fmt: skip
    return FinetuneDataConfig(**(values | changes))


def tune(
    config: ModelConfig | Path,
    layout: Layout,
    data: FinetuneDataConfig,
    dtype_name: str = "float64",
    steps: int = 4,
    micro_batch_size: int = 2,
    lora: LoraConfig | None = None,
    joined: bool = False,
    recompute: RecomputeConfig | None = None,
) -> Trained:
    """Train all weights, or adapters that already do something, of drawn weights or of those in a folder.

    Returns losses with the held-out loss behind them, norms, first gradients and weights, of what is trained.
    """
    mesh = ParallelMesh.create(Device("cpu"), layout)
    source: WeightSource
    source = open_weights(config) if isinstance(config, Path) else InitialWeights(config, seed=5)
    if lora is not None:
        source = used_adapters(source, lora)
    model = load_model(source, mesh, getattr(torch, dtype_name), joined)
    apply_recompute(model, recompute or RecomputeConfig(), mesh.pp_rank)
    apply_dropout(model, DropoutConfig(), 7, mesh)
    samples = PaddedBatchLoader(
        SFT_FORMAT, data, 7, (steps * BATCH, BATCH, 0), source.config.vocab_size, mesh
    )
    sizes = (micro_batch_size,) * (BATCH // micro_batch_size // layout.dp)
    gradients = first_gradients(model, samples.micro_batches(0, sizes), mesh)
    engine = NativeEngine(model, OptimizerConfig(lr=1e-3, clip_grad=0.5), mesh)
    losses, norms = [], []
    for step in range(steps):
        result = train_step(model, engine, samples.micro_batches(step * BATCH, sizes), mesh)
        losses.append(result.loss)
        norms.append(result.grad_norm or 0.0)
    losses.append(evaluate(model, samples.validation_batches(0, sizes), mesh))
    slices = parameter_slices(model, mesh)
    weights = {
        name: whole(p, slices[name], mesh.group("tp"))
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    return Trained(losses, norms, gradients, weights)


def used_adapters(base: WeightSource, lora: LoraConfig, seed: int = 3) -> AdaptedWeights:
    """Adapters as they are in the middle of a run: with B at zero, A would have no gradient to compare."""
    drawn = drawn_adapters(base, plan_adapters(lora, base.config, "the model"), seed)

    def read(name: str, index: Index) -> torch.Tensor:
        if name.endswith("lora_A.weight"):
            return drawn.read(name, index)
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return torch.empty(infos[name].shape).normal_(0.0, 0.1, generator=generator)[index]

    infos = {name: info for name, info in drawn.tensors().items() if ".lora_" in name}
    return AdaptedWeights(base, drawn.adapters, drawn.config, infos, read)
