"""A training step of a LLaMA shape, with as many layers as fit, beside transformers with its layers compiled.

Both hold fp32 master weights and moments, compute in bfloat16, clip and take AdamW's step: transformers by autocast,
ours as `asd-core pretrain --bf16` does. MFU is `6 x parameters in matrix products + 6 x layers x sequence x width of
the queries` operations for each token (Chowdhery et al., 2022, appendix B, with causal attention counted as half), over
the rate that the maker states.
"""

from collections.abc import Callable
from typing import Any

import torch

from ascendspeed_core.build import apply_kernels, kernel_context
from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.training import ComputeConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.mfu import training_flops_per_token
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.training.step import train_step
from on_device.plan import Shape
from on_device.setting import LeftOut, Setting, drawn_model, llama

MICRO_BATCHES = 4
"""Of a step: where many devices share the optimizer's work, its share of a step is smaller still."""

STATE_BYTES = 18
"""For each weight: bf16 weight, fp32 master weight, gradient and two moments."""

USED_SHARE = 0.78
"""Of the device's memory: transformers, whose weights are fp32 with copies in bf16, needs more than is counted here."""


def layers_that_fit(shape: Shape, memory_bytes: int | None) -> int:
    """Return how many layers a training step has room for, by the bytes of weights, state, activations and logits."""
    if memory_bytes is None:
        return shape.layers
    tokens = shape.batch * shape.length
    one, two = (llama(shape, layers).num_parameters for layers in (1, 2))
    of_layer = STATE_BYTES * (two - one) + tokens * (20 * shape.hidden + 8 * shape.ffn)
    fixed = STATE_BYTES * (2 * one - two) + tokens * shape.vocab * 14
    return max(min(int((USED_SHARE * memory_bytes - fixed) / of_layer), shape.layers), 1)


def measure(setting: Setting, name: str, way: str) -> dict[str, Any]:
    """Time the steps of one of the three."""
    if way == "transformers" and not setting.with_others:
        raise LeftOut("--alone was given")
    shape = setting.shape(name)
    config = llama(shape, layers_that_fit(shape, setting.device.memory_bytes()))
    tokens = shape.batch * shape.length
    needed = training_flops_per_token(config, shape.length) * tokens
    peak = setting.device.peak_flops("bfloat16")
    step = {"ours": our_step, "transformers": their_step, "megatron-core": megatron_step}[way](
        setting, config, shape
    )
    alone = setting.seconds(lambda: step(1), 4, 2)
    seconds = setting.seconds(lambda: step(MICRO_BATCHES), 3, 1) / MICRO_BATCHES

    def share(taken: float) -> float | None:
        return needed / taken / peak if peak else None

    figures: dict[str, Any] = {
        "layers": config.num_layers, "parameters": config.num_parameters, "tokens": MICRO_BATCHES * tokens,
        "TFLOP": MICRO_BATCHES * needed / 1e12, "seconds": MICRO_BATCHES * seconds, "tokens/s": tokens / seconds,
        "MFU": share(seconds), "seconds of one micro-batch": alone, "MFU of one micro-batch": share(alone),
        "GB": setting.device.peak_memory_bytes() / 1e9,
    }  # fmt: skip
    if setting.with_profile:
        figures["profile"] = setting.busy(lambda: step(1), 24)
    return figures


def token_ids(config: ModelConfig, shape: Shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (shape.batch, shape.length + 1), generator=generator)


def our_step(setting: Setting, config: ModelConfig, shape: Shape) -> Callable[[int], float]:
    mesh = setting.mesh
    model = drawn_model(config, mesh, torch.bfloat16, joined_projections=True)
    context = kernel_context(model, mesh, shape.length, BatchConfig(micro_batch_size=shape.batch))
    apply_kernels(model, ComputeConfig(), context)
    engine = NativeEngine(model, OptimizerConfig(), mesh)
    ids = token_ids(config, shape).to(mesh.device.torch)
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(shape.batch, shape.length, device=ids.device))
    return lambda micro_batches: train_step(model, engine, [batch] * micro_batches, mesh).loss


def megatron_step(setting: Setting, config: ModelConfig, shape: Shape) -> Callable[[int], float]:
    from on_device import engines

    step = engines.megatron_step(setting, config, "bfloat16", shape.length)
    ids = token_ids(config, shape).to(setting.device.torch)
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(shape.batch, shape.length, device=ids.device))
    return lambda micro_batches: step([batch] * micro_batches)[0]


def their_step(setting: Setting, config: ModelConfig, shape: Shape) -> Callable[[int], float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    device = setting.device.torch
    settings = LlamaConfig(**find_family("llama").write_config(config), attn_implementation="sdpa")
    settings.use_cache = False
    with torch.device(device):
        model = LlamaForCausalLM(settings)
    if not setting.is_small:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    ids = token_ids(config, shape).to(device)

    @torch.compile(disable=setting.is_small)
    def loss_of(hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(hidden)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def step(micro_batches: int) -> float:
        for _ in range(micro_batches):
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(model.model(ids[:, :-1]).last_hidden_state, ids[:, 1:])
            (loss / micro_batches).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
