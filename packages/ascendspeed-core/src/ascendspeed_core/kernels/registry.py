"""Which implementation of an operator a run uses: chosen once, by name or by `auto`, and said in a table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ascendspeed_core.config.compute import KERNELS
from ascendspeed_core.device import HOST, Device
from ascendspeed_core.kernels import compiled, liger, native_attention, native_elementwise, npu, reference
from ascendspeed_core.kernels.adamw import adamw_implementation
from ascendspeed_core.kernels.experts import (
    PermuteFunction,
    UnpermuteFunction,
    grouped_product,
    permute_tokens,
    torch_grouped_product,
    unpermute_tokens,
)
from ascendspeed_core.kernels.flex import flex_attention
from ascendspeed_core.kernels.fused_attention import causal_attention
from ascendspeed_core.kernels.reference import (
    GatedFunction,
    JoinedGatedFunction,
    layer_norm,
    rms_norm,
    rotate_both,
    silu_gated,
    token_losses,
)
from ascendspeed_core.kernels.triangle import triangle_attention
from ascendspeed_data.errors import AscendSpeedError, ConfigError

LARGE_LOGITS_BYTES = 1 << 30
"""Logits of a micro-batch from which on `auto` makes the loss without them: making them again takes a third longer."""

FROM_HIDDEN = "hidden"
"""The implementation of `cross_entropy` that takes hidden states in place of logits."""

ExpertLayers = Literal["plain", "adapted", "int8", "biased"]
"""Linear layers of experts: plain ones, some with adapters, or of int8 weights."""


@dataclass(frozen=True)
class KernelContext:
    """What decides whether an implementation can run.

    Attributes:
        device: of the model.
        dtype: of its weights.
        head_dim: size of a head.
        tp: ranks that share the vocabulary.
        has_additive_mask: scores get something added, as ALiBi does.
        drops_attention: attention's weights are dropped from.
        changes_scores: what the model does to scores that torch's and torch_npu's kernels cannot, if it does; see
            `kernels.reference.reference_attention`.
        seq_length: tokens of a sample, the most if lengths vary.
        lengths_vary: from step to step.
        micro_batch_tokens: most tokens of one forward pass.
        expert_layers: what the linear layers of experts are.
        logits_bytes: of this rank's logits of a micro-batch in fp32, where they are for a loss.
        needs_logits: why the loss must be made of logits; `None` where hidden states will do.
    """

    device: Device = HOST
    dtype: torch.dtype = torch.float32
    head_dim: int = 128
    tp: int = 1
    has_additive_mask: bool = False
    drops_attention: bool = False
    changes_scores: str | None = None
    seq_length: int | None = None
    lengths_vary: bool = False
    micro_batch_tokens: int | None = None
    expert_layers: ExpertLayers = "plain"
    logits_bytes: int | None = None
    needs_logits: str | None = None


UnsupportedReason = Callable[[KernelContext], str | None]
"""Why an implementation cannot run in a setting; `None` if it can."""


def _anywhere(_: KernelContext) -> None:
    return None


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operator.

    Attributes:
        name: by which it is asked for.
        run: the function; all implementations of an operator take and give the same.
        what: what it is, for the table that a run prints.
        auto_on: kinds of devices on which `auto` takes it.
        unsupported: why it cannot run.
        unfit: why `auto` leaves it to the next, although it could run.
    """

    name: str
    run: Callable[..., Any]
    what: str
    auto_on: Sequence[str]
    unsupported: UnsupportedReason
    unfit: UnsupportedReason = _anywhere


@dataclass(frozen=True)
class Choice:
    """One row of the table that a run prints at its start."""

    operator: str
    implementation: str
    reason: str


def _drops_weights(setting: KernelContext) -> str | None:
    if setting.drops_attention:
        return "attention_dropout drops weights, which only reference holds"
    return None


def _changes_scores(setting: KernelContext) -> str | None:
    if setting.changes_scores:
        return f"the model has {setting.changes_scores}, which only triangle, flex and reference compute"
    return None


def _needs_flex(setting: KernelContext) -> str | None:
    if setting.device.kind != "cuda":
        return f"torch's flex_attention has gradients on CUDA only, this is {setting.device.kind}"
    return _needs_compiler(setting)


def _needs_cpu(setting: KernelContext) -> str | None:
    if setting.device.kind != "cpu":
        return f"it is C++ for a CPU, this is {setting.device.kind}"
    return None


def _attention_fits(setting: KernelContext) -> str | None:
    if setting.has_additive_mask:
        return "it takes no ALiBi"
    return native_attention.why_not(setting.dtype, setting.head_dim)


def _elements_fit(setting: KernelContext) -> str | None:
    return native_elementwise.why_not(setting.dtype)


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


def _needs_compiler(setting: KernelContext) -> str | None:
    if setting.lengths_vary:
        return "torch.compile takes seconds for new kinds of shapes, and lengths vary"
    if setting.device.kind == "cuda" and find_spec("triton") is None:
        return "torch.compile needs the package triton, which is not installed"
    return None


def _softmax_fits(setting: KernelContext) -> str | None:
    length = setting.seq_length
    if setting.has_additive_mask:
        return "npu_scaled_masked_softmax takes no ALiBi"
    if setting.changes_scores:
        return f"npu_scaled_masked_softmax was not checked with {setting.changes_scores}"
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


def _plain_experts(setting: KernelContext) -> str | None:
    if setting.expert_layers != "plain":
        what = {"adapted": "adapters", "int8": "int8 weights", "biased": "biases"}[setting.expert_layers]
        return f"it multiplies plain weights, and experts have {what}"
    return None


def _grouped_mm_fits(setting: KernelContext) -> str | None:
    if setting.dtype == torch.float64:
        return "torch's grouped_mm takes float16, bfloat16 and float32, not float64"
    return None


def _takes_hidden(setting: KernelContext) -> str | None:
    return setting.needs_logits


def _few_logits(setting: KernelContext) -> str | None:
    size = setting.logits_bytes
    if size is None:
        return "how large logits are is not known"
    if size < LARGE_LOGITS_BYTES:
        return f"logits of a micro-batch take {size / (1 << 30):.2f} GiB, less than 1"
    return None


def _whole_vocabulary(setting: KernelContext) -> str | None:
    if setting.tp > 1:
        return f"the vocabulary is cut over tp={setting.tp} ranks"
    return None


def _first(*reasons: UnsupportedReason) -> UnsupportedReason:
    """Return what names the first reason of several."""
    return lambda setting: next((found for reason in reasons if (found := reason(setting))), None)


def _torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


Attached = tuple[Callable[..., Any], UnsupportedReason]
"""A function, and why it cannot run in a setting."""


def _attach(operator: str, functions: Mapping[str, Attached]) -> tuple[Implementation, ...]:
    """Join an operator's row of `KERNELS` with the functions, which must be of the same names."""
    kernels = KERNELS[operator]
    if functions.keys() != kernels.keys():
        raise AssertionError(
            f"{operator}: the kernels are {', '.join(kernels)}, the functions {', '.join(functions)}"
        )
    return tuple(
        Implementation(
            name,
            functions[name][0],
            kernel.description,
            kernel.auto_on,
            functions[name][1],
            _UNFIT.get((operator, name), _anywhere),
        )
        for name, kernel in kernels.items()
    )


_FUNCTIONS: Mapping[str, Mapping[str, Attached]] = {
    "attention": {
        "npu": (npu.npu_attention, _first(_needs_npu, _drops_weights, _changes_scores)),
        "native": (
            native_attention.native_attention,
            _first(_drops_weights, _changes_scores, _needs_cpu, _attention_fits),
        ),
        "sdpa": (causal_attention, _first(_drops_weights, _changes_scores)),
        "triangle": (triangle_attention, _drops_weights),
        "flex": (flex_attention, _first(_drops_weights, _needs_flex)),
        "reference": (reference.reference_attention, _anywhere),
    },
    "scaled_masked_softmax": {
        "npu": (npu.npu_softmax, _first(_needs_npu, _softmax_fits)),
        "reference": (reference.scaled_masked_softmax, _anywhere),
    },
    "rms_norm": {
        "npu": (npu.npu_rms_norm, _needs_npu),
        "native": (native_elementwise.native_rms_norm, _first(_needs_cpu, _elements_fit)),
        "liger": (liger.liger_rms_norm, _needs_liger),
        "torch": (_torch_rms_norm, _anywhere),
        "reference": (rms_norm, _anywhere),
    },
    "layer_norm": {
        "liger": (liger.liger_layer_norm, _needs_liger),
        "torch": (layer_norm, _anywhere),
        "reference": (reference.plain_layer_norm, _anywhere),
    },
    "rotary": {
        "npu": (npu.npu_rotate, _needs_npu),
        "native": (native_elementwise.native_rotate, _first(_needs_cpu, _elements_fit)),
        "compiled": (compiled.rotate_both, _needs_compiler),
        "liger": (liger.liger_rotate, _needs_liger),
        "reference": (rotate_both, _anywhere),
    },
    "swiglu": {
        "npu": (npu.npu_gated, _needs_npu),
        "native": (native_elementwise.native_gated, _first(_needs_cpu, _elements_fit)),
        "compiled": (compiled.silu_gated, _needs_compiler),
        "liger": (liger.liger_gated, _needs_liger),
        "reference": (silu_gated, _anywhere),
    },
    "token_permutation": {
        "npu": (npu.npu_permute_tokens, _needs_npu),
        "reference": (permute_tokens, _anywhere),
    },
    "grouped_product": {
        "npu": (npu.npu_grouped_product, _first(_needs_npu, _plain_experts)),
        "grouped_mm": (torch_grouped_product, _first(_grouped_mm_fits, _plain_experts)),
        "reference": (grouped_product, _anywhere),
    },
    "cross_entropy": {
        # The function is for who has logits all the same; the loss is `parallel.cross_entropy.hidden_cross_entropy`.
        FROM_HIDDEN: (token_losses, _takes_hidden),
        "npu": (npu.npu_token_losses, _first(_whole_vocabulary, _needs_npu, _losses_fit)),
        "liger": (liger.liger_token_losses, _first(_whole_vocabulary, _needs_liger)),
        "compiled": (compiled.token_losses, _first(_whole_vocabulary, _needs_compiler)),
        "torch": (token_losses, _anywhere),
        "reference": (reference.plain_token_losses, _whole_vocabulary),
    },
}

_UNFIT: Mapping[tuple[str, str], UnsupportedReason] = {("cross_entropy", FROM_HIDDEN): _few_logits}

OPERATORS: dict[str, tuple[Implementation, ...]] = {
    operator: _attach(operator, _FUNCTIONS[operator]) for operator in KERNELS
}
"""Implementations of each operator; `auto` takes the first that is meant for the device and can run."""


JOINED_GATED: Mapping[GatedFunction, JoinedGatedFunction] = {
    npu.npu_gated: npu.npu_gated_joined,
    native_elementwise.native_gated: native_elementwise.native_gated_joined,
    compiled.silu_gated: compiled.silu_gated_joined,
}
"""What some implementations of `swiglu` do with gate and up side by side, as joined projections leave them."""


UNPERMUTE: Mapping[PermuteFunction, UnpermuteFunction] = {
    npu.npu_permute_tokens: npu.npu_unpermute_tokens,
    permute_tokens: unpermute_tokens,
}
"""The way back of each implementation of `token_permutation`."""


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
        unsupported = implementation.unsupported(setting)
        if asked == implementation.name:
            if unsupported:
                able = [other.name for other in OPERATORS[operator] if not other.unsupported(setting)]
                raise AscendSpeedError(
                    f"{operator}={asked} cannot run here: {unsupported}; choose auto or {', '.join(able)}"
                )
            return implementation, Choice(operator, asked, f"asked for; {implementation.what}")
        if asked == "auto" and setting.device.kind in implementation.auto_on:
            unsupported = unsupported or implementation.unfit(setting)
            if unsupported is None:
                reason = "; ".join([implementation.what, *passed_over])
                return implementation, Choice(operator, implementation.name, reason)
            passed_over.append(f"not {implementation.name}: {unsupported}")
    raise ConfigError(
        f"{operator}={asked} does not exist; choose auto or {', '.join(i.name for i in OPERATORS[operator])}"
    )


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
