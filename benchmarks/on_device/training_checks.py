"""Ten training steps on the device against ten on the host, from the same weights and batches.

In float32 losses differ by sums in another order, which AdamW passes on: where a gradient is nearly zero it turns
rounding into steps. In 16 bits each step rounds in other places on the two, so losses stay within a handful of
round-offs of a loss of 5.
"""

import random
from dataclasses import dataclass, field
from typing import Any

import torch

from ascendspeed_core.build import apply_kernels, kernel_context, load_model
from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.experts import Experts
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.training import ComputeConfig, DropoutConfig, LossScaleConfig, RecomputeConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import HOST, Device
from ascendspeed_core.optim.loss_scale import LossScale
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.dropout import apply_dropout
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import apply_recompute
from ascendspeed_core.training.step import train_step
from ascendspeed_core.weights import InitialWeights
from ascendspeed_core.weights.adapters.lora import drawn_adapters, plan_adapters
from on_device.plan import SMALL
from on_device.setting import Setting, check_within, llama, relative_error

STEPS, LENGTH = 10, 96
TOLERANCE = {
    "float32": {"loss": 5e-5, "norm": 1e-3, "weights": 1e-3},
    "bfloat16": {"loss": 5e-3, "norm": 5e-2, "weights": 2e-2},
    "float16": {"loss": 2e-3, "norm": 2e-2, "weights": 1e-2},
}
PLAIN = llama(SMALL, length=LENGTH, initializer_range=0.08)


@dataclass(frozen=True)
class Case:
    """How a model is trained."""

    model: ModelConfig = PLAIN
    dtype: str = "float32"
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    layout: Layout = field(default_factory=Layout)
    lora: LoraConfig | None = None
    is_packed: bool = False
    micro_batches: int = 1
    loss_scale: LossScaleConfig = field(
        default_factory=lambda: LossScaleConfig(initial_loss_scale=2.0**15, loss_scale_window=4)
    )


def cases() -> dict[str, Case]:
    """Return the cases of `plan.TRAINING_CASES`."""
    window = PLAIN.model_copy(update={"family": "mistral", "sliding_window": 17})
    alibi = PLAIN.model_copy(
        update={
            "family": "bloom", "position": "alibi", "norm": "layernorm", "mlp": "gelu", "num_key_value_heads": 4,
            "qkv_bias": True, "output_bias": True, "mlp_bias": True, "embedding_norm": True, "ffn_hidden_size": 256,
        }
    )  # fmt: skip
    qwen = PLAIN.model_copy(update={"family": "qwen2", "qkv_bias": True, "tie_word_embeddings": True})
    normalised = PLAIN.model_copy(
        update={"family": "baichuan", "normalised_head": True, "num_key_value_heads": 4}
    )

    experts = PLAIN.model_copy(
        update={"family": "mixtral", "experts": Experts(count=4, per_token=2, ffn_hidden_size=96)}
    )

    def recomputing(policy: Any) -> RecomputeConfig:
        return RecomputeConfig(checkpoint_activations=True, checkpoint_policy=policy)

    return {
        "llama float32": Case(),
        "llama bfloat16": Case(dtype="bfloat16"),
        "window and grouped heads float32": Case(window),
        "ALiBi and layer norm float32": Case(alibi),
        "biases and tied head float32": Case(qwen),
        "normalised head float32": Case(normalised),
        "packed samples float32": Case(is_packed=True),
        "packed samples bfloat16": Case(dtype="bfloat16", is_packed=True),
        "recompute full bfloat16": Case(dtype="bfloat16", recompute=recomputing("full")),
        "recompute selective bfloat16": Case(dtype="bfloat16", recompute=recomputing("selective")),
        "LoRA float32": Case(lora=LoraConfig(lora_target_modules=("all-linear",), lora_r=4)),
        "joined projections bfloat16": Case(dtype="bfloat16", compute=ComputeConfig(mlp_layer_fusion=True)),
        "sharded optimizer bfloat16": Case(dtype="bfloat16", layout=Layout(sharded_optimizer=True)),
        "dropout float32": Case(dropout=DropoutConfig(hidden_dropout=0.1, attention_dropout=0.1)),
        "float16 with a loss scale": Case(dtype="float16"),
        "bfloat16 with float32 sums of four micro-batches": Case(dtype="bfloat16", micro_batches=4),
        "sgd float32": Case(optimizer=OptimizerConfig(optimizer="sgd", lr=1e-2)),
        "experts float32": Case(experts),
    }


def check(setting: Setting, name: str) -> dict[str, Any]:
    """Run a case on both and compare losses, gradient norms and the weights at the end."""
    case = cases()[name]
    batches = [drawn_batches(case, step) for step in range(STEPS)]
    ours, our_weights = run(case, setting.device, batches)
    theirs, their_weights = run(case, HOST, batches)
    if [one is None for _, one in ours] != [one is None for _, one in theirs]:
        raise AssertionError(f"skipped steps differ: {ours} and {theirs}")
    largest = {
        "loss": max(abs(a - b) / b for (a, _), (b, _) in zip(ours, theirs, strict=True)),
        "norm": max(abs(a - b) / b for (_, a), (_, b) in zip(ours, theirs, strict=True) if a and b),
        "weights": max(
            relative_error(our_weights[key], their_weights[key])
            for key in their_weights
            # Without rotary positions the bias of keys has no effect: its gradient is rounding alone.
            if case.model.position == "rotary" or not key.endswith("k_proj.bias")
        ),
    }
    if name.startswith("normalised"):
        # The length of a row of this head has no gradient, so only rounding decides where AdamW takes it.
        largest.pop("weights")
    check_within(largest, TOLERANCE[case.dtype])
    return {**largest, "first loss": theirs[0][0], "last loss": theirs[-1][0]}


def run(
    case: Case, device: Device, batches: list[list[MicroBatch]]
) -> tuple[list[tuple[float, float | None]], dict[str, torch.Tensor]]:
    """Train, and return the loss and the gradient's norm of each step, and the trained weights."""
    mesh = ParallelMesh(device, case.layout)
    source: Any = InitialWeights(case.model, 1)
    if case.lora is not None:
        source = drawn_adapters(source, plan_adapters(case.lora, case.model, "the model"), 3)
    model = load_model(source, mesh, getattr(torch, case.dtype), case.compute.mlp_layer_fusion)
    context = kernel_context(
        model,
        mesh,
        LENGTH,
        BatchConfig(micro_batch_size=2),
        drops_attention=case.dropout.attention_dropout > 0,
    )
    apply_kernels(model, case.compute, context)
    apply_recompute(model, case.recompute, 0)
    engine = NativeEngine(model, case.optimizer, mesh)
    apply_dropout(model, case.dropout, 7, mesh)
    scale = LossScale.create(case.loss_scale, is_fp16=case.dtype == "float16")
    found = []
    for micro_batches in batches:
        placed = [one.to(device.torch) for one in micro_batches]
        result = train_step(model, engine, placed, mesh, scale)
        found.append((result.loss, result.grad_norm))
    trained = {name: p.detach().to(HOST.torch) for name, p in model.named_parameters() if p.requires_grad}
    return found, trained


def drawn_batches(case: Case, step: int) -> list[MicroBatch]:
    """Return the micro-batches of a step: a few patterns that repeat, so that there is something to learn."""
    draw = random.Random(step)
    made = []
    for number in range(case.micro_batches):
        rows = []
        for _ in range(2):
            period = draw.randint(3, 9)
            motif = [draw.randrange(3, case.model.vocab_size) for _ in range(period)]
            rows.append([motif[at % period] for at in range(LENGTH + 1)])
        ids = torch.tensor(rows)
        mask = (torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(step)) > 0.1).float()
        positions = segments = None
        if case.is_packed:
            ends = sorted(draw.sample(range(1, LENGTH), 4))
            segments = torch.tensor([[sum(at >= end for end in ends) for at in range(LENGTH)]] * 2)
            starts = [0, *ends]
            positions = torch.tensor([[at - starts[int(segments[0, at])] for at in range(LENGTH)]] * 2)
        samples = torch.arange(2) + 2 * (step * case.micro_batches + number)
        made.append(MicroBatch(ids[:, :-1], ids[:, 1:], mask, positions, segments, samples))
    return made
