"""Recompute: activations that the backward pass needs are computed again instead of kept.

(Chen et al., 2016, Training Deep Nets with Sublinear Memory Cost; Korthikanti et al., 2022, section 5, for choosing
what is worth it.) It is applied from outside, to whole layers or to a part of each; the model knows nothing of it, and
computes the same numbers.

What a layer sends to other ranks under tensor parallelism is sent again, in the same order on all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ascendspeed_core.config.recompute import Mode
from ascendspeed_core.config.training import RecomputeConfig
from ascendspeed_core.kernels.native_attention import NATIVE_OPERATOR
from ascendspeed_core.kernels.triangle import TRIANGLE_OPERATOR
from ascendspeed_core.models.transformer import Transformer

aten = torch.ops.aten

KEPT_OPERATORS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._flash_attention_forward.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    TRIANGLE_OPERATOR,
    NATIVE_OPERATOR,
)
"""What policy `selective` keeps: the operators that take the time. The others take the memory."""

KEPT_NPU_OPERATORS = ("npu::npu_fusion_attention", "npu::npu_fusion_attention_v2")
"""Those of an NPU, by name: they exist where torch_npu is loaded."""


def apply_recompute(model: Transformer, config: RecomputeConfig, pp_rank: int) -> None:
    """Make the layers of this process drop activations as `config` says, in place.

    Args:
        model: this rank's stages, cut and filled.
        config: policy.
        pp_rank: which entry of `recomputation_layer_num` is this rank's.

    Policy `auto` needs measuring, see `planner.fit_memory`; nothing is done for it here.
    """
    if not config.checkpoint_activations or config.checkpoint_policy == "auto":
        return
    for layer in recomputed_layers(model, config, pp_rank):
        if config.checkpoint_policy == "attention":
            recompute(layer.get_submodule("attention"), "full")
        else:
            recompute(layer, "selective" if config.checkpoint_policy == "selective" else "full")


def recomputed_layers(model: Transformer, config: RecomputeConfig, pp_rank: int) -> list[nn.Module]:
    """Return the layers that a policy touches: the first ones of each stage, or all."""
    chosen: list[nn.Module] = []
    left = config.recomputation_layer_num[pp_rank] if config.checkpoint_policy == "custom" else 0
    for stage in model.stages:
        count = len(stage.layers)
        if config.checkpoint_policy == "block":
            count = min(count, config.checkpoint_block_layer)
        elif config.checkpoint_policy == "custom":
            count, left = min(count, left), max(left - count, 0)
        chosen += [model.layers[str(number)] for number in stage.layers[:count]]
    return chosen


def recompute(module: nn.Module, mode: Mode) -> None:
    """Make a module drop its activations and compute them again, in place."""
    if mode == "none":
        return
    forward = module.forward
    options: dict[str, Any] = {}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Nothing in a layer draws random numbers.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options, **kwargs)

    module.forward = recomputed


@contextmanager
def recomputed(module: nn.Module, mode: Mode) -> Iterator[None]:
    """Let a module recompute for a while."""
    before = vars(module).get("forward")
    recompute(module, mode)
    try:
        yield
    finally:
        if before is not None:
            module.forward = before
        elif mode != "none":
            del module.forward


def _keep_products(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_kept = operator in KEPT_OPERATORS or operator.name() in KEPT_NPU_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
