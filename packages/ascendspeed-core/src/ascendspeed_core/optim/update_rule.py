"""How a gradient changes a weight: AdamW (Loshchilov and Hutter, 2019), or SGD with momentum.

`adam` and `fused_adam` compute the same. `adam` takes what needs least memory, `fused_adam` what is fastest; often that
is one kernel, see `kernels.adamw`.
"""

from collections.abc import Mapping, Sequence

import torch

from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.device import HOST, Device
from ascendspeed_core.kernels.adamw import adamw_implementation

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_state_keys(config: OptimizerConfig) -> tuple[str, ...]:
    """Return the tensors that a rule keeps for each parameter, as torch and checkpoints name them."""
    if config.optimizer != "sgd":
        return ADAM_MOMENTS
    return ("momentum_buffer",) if config.sgd_momentum else ()


def make_update_rule(
    config: OptimizerConfig,
    matrices: Sequence[torch.Tensor],
    vectors: Sequence[torch.Tensor],
    device: Device,
) -> torch.optim.Optimizer:
    """Return the rule for some weights.

    Args:
        config: which one, and its numbers.
        matrices: weights that decay.
        vectors: norms and biases, which do not.
        device: where they are.
    """
    groups = [
        {"params": list(matrices), "weight_decay": config.weight_decay, "wd_mult": 1.0},
        {"params": list(vectors), "weight_decay": 0.0, "wd_mult": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, config.sgd_momentum, fused=True)
    dtype = next((weight.dtype for weight in (*matrices, *vectors)), torch.float32)
    implementation = adamw_implementation(config.optimizer, device, dtype)
    betas = (config.adam_beta1, config.adam_beta2)
    return implementation.make(groups, config.lr, betas, config.adam_eps)


def load_optimizer_state(
    rule: torch.optim.Optimizer, weight: torch.Tensor, memory: Mapping[str, torch.Tensor], num_steps: int
) -> None:
    """Let a rule remember for one weight what `optimizer_state_keys` names.

    Args:
        rule: of `make_update_rule`.
        weight: one of its weights.
        memory: tensors of the weight's shape, anywhere.
        num_steps: steps that led to them.
    """
    # Copies of the weight's own layout: what is read may be a view of a file, with gaps between rows, which fused
    # kernels would not notice.
    state = {kind: torch.empty_like(weight).copy_(value) for kind, value in memory.items()}
    if not isinstance(rule, torch.optim.SGD):
        # torch keeps the step count of a fused optimizer on the device, of others on the host.
        holder = weight.device if rule.defaults.get("fused") else HOST.torch
        state["step"] = torch.tensor(float(num_steps), device=holder)
    rule.state[weight] = state
