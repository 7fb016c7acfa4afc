"""Which implementation of an operator a run uses: chosen once, by name or by `auto`, and said in a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from ascendspeed_core.config.compute import ComputeConfig
from ascendspeed_core.config.training import BatchConfig
from ascendspeed_core.device import HOST, Device
from ascendspeed_core.kernels import liger, npu, reference
from ascendspeed_core.kernels.adamw import adamw_implementation
from ascendspeed_core.kernels.triangle import triangle_attention
from ascendspeed_core.models.attention import Attention, causal_attention
from ascendspeed_core.models.lm_head import token_losses
from ascendspeed_core.models.mlp import SwiGLU, silu_gated
from ascendspeed_core.models.norm import LayerNorm, RMSNorm, layer_norm, rms_norm
from ascendspeed_core.models.position import rotate_both
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import AscendSpeedError, ConfigError


@dataclass(frozen=True)
class KernelContext:
    """What decides whether an implementation can run.

    Attributes:
        device: of the model.
        dtype: of its weights.
        tp: devices that share the vocabulary.
        has_additive_mask: scores get something added, as ALiBi does.
        drops_attention: attention's weights are dropped from.
        seq_length: tokens of a sample, the most if lengths vary.
        lengths_vary: from step to step.
        micro_batch_tokens: most tokens of one forward pass.
    """

    device: Device = HOST
    dtype: torch.dtype = torch.float32
    tp: int = 1
    has_additive_mask: bool = False
    drops_attention: bool = False
    seq_length: int | None = None
    lengths_vary: bool = False
    micro_batch_tokens: int | None = None

    @classmethod
    def of(
        cls,
        model: Transformer,
        mesh: ParallelMesh,
        seq_length: int,
        batch: BatchConfig,
        lengths_vary: bool = False,
        drops_attention: bool = False,
    ) -> "KernelContext":
        """Return the setting of a training run."""
        largest = max((batch.micro_batch_size, *batch.manual_sizes()))
        return cls(
            device=mesh.device,
            dtype=next(model.parameters()).dtype,
            tp=mesh.layout.tp,
            has_additive_mask=model.config.position == "alibi",
            drops_attention=drops_attention,
            seq_length=seq_length,
            lengths_vary=lengths_vary,
            micro_batch_tokens=largest * seq_length,
        )


UnsupportedReason = Callable[[KernelContext], str | None]
"""Why an implementation cannot run in a setting; `None` if it can."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        name: by which it is asked for.
        run: the function; all implementations of an operator take and give the same.
        what: what it is, for the table.
        auto_on: kinds of devices on which `auto` takes it.
        obstacle: why it cannot run.
    """

    name: str
    run: Callable[..., Any]
    what: str
    auto_on: Sequence[str] = ()
    obstacle: UnsupportedReason = lambda _: None


@dataclass(frozen=True)
class Choice:
    """One row of the table that a run prints at its start."""

    operator: str
    implementation: str
    reason: str


EVERYWHERE = ("cpu", "cuda", "npu")


def _holds_weights(setting: KernelContext) -> str | None:
    if setting.drops_attention:
        return "attention_dropout drops weights, which only reference holds"
    return None


def _needs_npu(setting: KernelContext) -> str | None:
    if setting.device.kind != "npu":
        return f"it needs an NPU, this is {setting.device.kind}"
    if setting.dtype == torch.float64:
        return "torch_npu's operators take float16, bfloat16 and float32, not float64"
    return None


def _needs_liger(setting: KernelContext) -> str | None:
    if setting.device.kind != "cuda":
        return f"Liger-Kernel needs a GPU, this is {setting.device.kind}"
    if setting.dtype == torch.float64:
        return "Liger-Kernel computes in float32, not in float64"
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed (ascendspeed-core[liger])"
    return None


def _softmax_fits(setting: KernelContext) -> str | None:
    length = setting.seq_length
    if setting.has_additive_mask:
        return "npu_scaled_masked_softmax takes no ALiBi"
    if setting.lengths_vary:
        return "npu_scaled_masked_softmax takes multiples of 32 as seq_length, lengths vary (--no-variable-seq-lengths)"
    if length is None or length % 32 or not 32 <= length <= 4096:
        return (
            f"npu_scaled_masked_softmax takes multiples of 32 from 32 to 4096 as seq_length, this is {length}"
        )
    return None


def _losses_fit(setting: KernelContext) -> str | None:
    tokens = setting.micro_batch_tokens
    if tokens is None or tokens > 200_000:
        return f"npu_cross_entropy_loss takes up to 200000 tokens at once, a micro-batch has {tokens}"
    return None


def _whole_vocabulary(setting: KernelContext) -> str | None:
    if setting.tp > 1:
        return f"the vocabulary is cut over tp={setting.tp} devices"
    return None


def _first(*obstacles: UnsupportedReason) -> UnsupportedReason:
    """Return what names the first of several obstacles."""
    return lambda setting: next((found for obstacle in obstacles if (found := obstacle(setting))), None)


def _torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


FUSED_NPU = "torch_npu's fused operator"
PLAIN = "plain torch"

OPERATORS: dict[str, tuple[Implementation, ...]] = {
    "attention": (
        Implementation(
            "npu",
            npu.npu_attention,
            f"{FUSED_NPU}: npu_fusion_attention",
            ("npu",),
            _first(_needs_npu, _holds_weights),
        ),
        Implementation(
            "sdpa",
            causal_attention,
            "torch's own, which takes the device's fused one",
            EVERYWHERE,
            _holds_weights,
        ),
        Implementation(
            "triangle", triangle_attention, "by blocks, none above the diagonal", (), _holds_weights
        ),
        Implementation(
            "reference", reference.reference_attention, "plain torch, all scores in memory", EVERYWHERE
        ),
    ),
    "scaled_masked_softmax": (
        Implementation("npu", npu.npu_softmax, FUSED_NPU, ("npu",), _first(_needs_npu, _softmax_fits)),
        Implementation("reference", reference.scaled_masked_softmax, PLAIN, EVERYWHERE),
    ),
    "rms_norm": (
        Implementation("npu", npu.npu_rms_norm, FUSED_NPU, ("npu",), _needs_npu),
        Implementation("liger", liger.liger_rms_norm, "Liger-Kernel", (), _needs_liger),
        Implementation("torch", _torch_rms_norm, "torch's fused one", ("cuda",)),
        Implementation("reference", rms_norm, PLAIN, EVERYWHERE),
    ),
    "layer_norm": (
        Implementation("liger", liger.liger_layer_norm, "Liger-Kernel", (), _needs_liger),
        Implementation("torch", layer_norm, "torch's own, which is fused on every device", EVERYWHERE),
        Implementation("reference", reference.plain_layer_norm, PLAIN),
    ),
    "rotary": (
        Implementation("npu", npu.npu_rotate, f"{FUSED_NPU}: npu_rotary_mul", ("npu",), _needs_npu),
        Implementation("liger", liger.liger_rotate, "Liger-Kernel", ("cuda",), _needs_liger),
        Implementation("reference", rotate_both, PLAIN, EVERYWHERE),
    ),
    "swiglu": (
        Implementation("npu", npu.npu_gated, FUSED_NPU, ("npu",), _needs_npu),
        Implementation("liger", liger.liger_gated, "Liger-Kernel", ("cuda",), _needs_liger),
        Implementation("reference", silu_gated, PLAIN, EVERYWHERE),
    ),
    "cross_entropy": (
        Implementation(
            "npu",
            npu.npu_token_losses,
            FUSED_NPU,
            ("npu",),
            _first(_whole_vocabulary, _needs_npu, _losses_fit),
        ),
        Implementation(
            "liger", liger.liger_token_losses, "Liger-Kernel", (), _first(_whole_vocabulary, _needs_liger)
        ),
        Implementation("torch", token_losses, "torch's own", EVERYWHERE),
        Implementation("reference", reference.plain_token_losses, PLAIN, (), _whole_vocabulary),
    ),
}
"""Implementations of each operator; `auto` takes the first that is meant for the device and can run."""


def implementations(operator: str) -> dict[str, Callable[..., Any]]:
    """Return the functions that compute an operator, by name."""
    return {implementation.name: implementation.run for implementation in OPERATORS[operator]}


def choose(operator: str, asked: str, setting: KernelContext) -> tuple[Implementation, Choice]:
    """Return the implementation of an operator, and why it is that one.

    Args:
        operator: key of `OPERATORS`.
        asked: a name, or `auto`.
        setting: where it runs.

    Raises:
        AscendSpeedError: the one asked for cannot run here.
    """
    passed_over: list[str] = []
    for implementation in OPERATORS[operator]:
        obstacle = implementation.obstacle(setting)
        if asked == implementation.name:
            if obstacle:
                able = [other.name for other in OPERATORS[operator] if not other.obstacle(setting)]
                raise AscendSpeedError(
                    f"{operator}={asked} cannot run here: {obstacle}; choose auto or {', '.join(able)}"
                )
            return implementation, Choice(operator, asked, f"asked for; {implementation.what}")
        if asked == "auto" and setting.device.kind in implementation.auto_on:
            if obstacle is None:
                reason = "; ".join([implementation.what, *passed_over])
                return implementation, Choice(operator, implementation.name, reason)
            passed_over.append(f"not {implementation.name}: {obstacle}")
    raise ConfigError(
        f"{operator}={asked} does not exist; choose auto or {', '.join(i.name for i in OPERATORS[operator])}"
    )


def apply_kernels(
    model: Transformer, config: ComputeConfig, setting: KernelContext | None = None
) -> list[Choice]:
    """Give the layers of this process the implementations that `config` asks for, in place.

    Args:
        model: this process's part.
        config: names, or `auto`.
        setting: where it runs; by default a CPU with the whole vocabulary.

    Returns:
        What was chosen, by operator.

    Raises:
        ConfigError: an operator was named that the model does not have.
        AscendSpeedError: an implementation was named that cannot run here.
    """
    setting = setting or KernelContext()
    chosen: dict[str, Callable[..., Any]] = {}
    choices: list[Choice] = []
    for operator, asked in config.kernel_names().items():
        reason = _absence(operator, model, choices)
        if reason is None:
            implementation, choice = choose(operator, asked, setting)
            chosen[operator] = implementation.run
            choices.append(choice)
        elif asked != "auto":
            raise ConfigError(f"{operator}={asked} was asked for, but {reason}; leave it out")
    if "scaled_masked_softmax" in chosen:
        chosen["attention"] = partial(chosen["attention"], softmax=chosen["scaled_masked_softmax"])
    model.token_losses = chosen["cross_entropy"]
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = chosen["attention"]
            module.attend_dropping = chosen["attention"] if setting.drops_attention else None
            module.rotate = chosen.get("rotary", module.rotate)
        elif isinstance(module, RMSNorm):
            module.normalise = chosen["rms_norm"]
        elif isinstance(module, LayerNorm):
            module.normalise = chosen["layer_norm"]
        elif isinstance(module, SwiGLU):
            module.gated = chosen["swiglu"]
    return choices


def _absence(operator: str, model: Transformer, before: Sequence[Choice]) -> str | None:
    """Return why a model does not compute an operator; `None` if it does."""
    described = model.config
    if operator == "rms_norm" and described.norm != "rmsnorm" and not described.qk_norm:
        return "the model has no RMSNorm"
    if operator == "layer_norm" and described.norm != "layernorm":
        return "the model has no LayerNorm"
    if operator == "rotary" and described.position != "rotary":
        return "the model has no rotary embedding"
    if operator == "swiglu" and described.mlp != "swiglu":
        return "the model has no SwiGLU"
    if operator == "scaled_masked_softmax" and before[0].implementation != "reference":
        return "only --attention reference computes a softmax of its own"
    return None


def update_choice(optimizer: str, setting: KernelContext) -> Choice:
    """Return the row of the optimizer's kernel.

    Args:
        optimizer: `adam`, `fused_adam` or `sgd`.
        setting: device and format of the weights; 16-bit ones are updated in fp32.
    """
    if optimizer == "sgd":
        return Choice("sgd", "fused", "torch's kernel, all tensors in one call in place")
    wide = torch.float64 if setting.dtype == torch.float64 else torch.float32
    chosen = adamw_implementation(optimizer, setting.device, wide)
    return Choice("adamw", chosen.name, chosen.reason)


def table(choices: Sequence[Choice]) -> list[str]:
    """Return rows as aligned lines."""
    wide = max(len(choice.operator) for choice in choices)
    names = max(len(choice.implementation) for choice in choices)
    return [
        f"kernel: {choice.operator:{wide}s}  {choice.implementation:{names}s}  {choice.reason}"
        for choice in choices
    ]
