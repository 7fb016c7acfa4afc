"""Further fields of megatron-core's configs, which `--megatron-args` gives: checked by their dataclasses."""

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.recompute import RecomputeConfig
from ascendspeed_core.optim.megatron.core import config_class
from ascendspeed_core.optim.megatron.settings import ddp_fields, optimizer_fields, transformer_fields
from ascendspeed_data.errors import ConfigError, did_you_mean

OF_ROUTERS = "routers are this project's, whose options the run has"

UNSUPPORTED = {
    "use_precision_aware_optimizer": "checkpoints hold the optimizer's state in fp32",
    "optimizer_cpu_offload": "checkpoints hold the optimizer's state as the device has it",
    "use_megatron_fsdp": "it shards weights, of which this engine knows nothing",
    "use_custom_fsdp": "it shards weights, of which this engine knows nothing",
    "num_distributed_optimizer_instances": "ranks of one mesh would hold the same state",
    "overlap_param_gather_with_optimizer_step": "it makes an optimizer of its own for the first stage",
    "mtp_num_layers": "the model has no layers for further tokens",
    "transformer_impl": "the engine takes megatron-core's own layers",
    "cpu_offloading": "it needs Transformer Engine",
    "fp8": "--fp8 says it, which takes layers that have it",
    "fp8_recipe": "--fp8-recipe says it",
    "fp8_param": "weights would be held in FP8, of which checkpoints know nothing",
    **dict.fromkeys(
        (
            "moe_aux_loss_coeff",
            "moe_z_loss_coeff",
            "moe_input_jitter_eps",
            "moe_expert_capacity_factor",
            "moe_token_drop_policy",
            "moe_pad_expert_input_to_capacity",
        ),
        OF_ROUTERS,
    ),
    "fp4": "it needs Transformer Engine's layers",
    "tp_comm_overlap": "it needs Transformer Engine's layers",
    "average_in_collective": "gradients are sums over the global batch",
    "gradient_reduce_div_fusion": "gradients are sums over the global batch",
}
"""Fields that would change what is computed or stored in a way that the engine does not follow, and why."""


def check_fields(given: Mapping[str, dict[str, Any]], path: Path) -> dict[str, dict[str, Any]]:
    """Return the fields, with values of the types that their dataclasses name.

    Args:
        given: by the name of the config.
        path: of the file.

    Raises:
        ConfigError: a field that there is not, that the run decides, or a value of another type.
    """
    return {
        kind: {name: _checked(kind, name, value, path) for name, value in fields.items()}
        for kind, fields in given.items()
    }


def _checked(kind: str, name: str, value: Any, path: Path) -> Any:
    made = config_class(kind)
    known = {field.name for field in dataclasses.fields(made)}
    if name not in known:
        raise ConfigError(
            f"{path}: {kind} of this megatron-core has no field {name}{did_you_mean(name, known)}; leave it out"
        )
    if name in _fields_of_run(kind):
        raise ConfigError(f"{path}: {kind}.{name} is decided by the run's own options; leave it out")
    reason = OF_ROUTERS if name.startswith("moe_router_") else UNSUPPORTED.get(name)
    if reason is not None:
        raise ConfigError(f"{path}: {kind}.{name} is refused: {reason}; leave it out")
    hint = typing.get_type_hints(made)[name]
    try:
        return TypeAdapter(hint).validate_python(value, strict=True)
    except ValidationError as error:
        raise ConfigError(
            f"{path}: {kind}.{name}={value!r}: {error.errors()[0]['msg'].lower()}; correct it"
        ) from None
    except PydanticUserError:
        raise ConfigError(
            f"{path}: {kind}.{name} takes no value that a JSON file holds; leave it out"
        ) from None


def _fields_of_run(kind: str) -> set[str]:
    """Return the fields that the engine sets for some run."""
    if kind == "OptimizerConfig":
        return set(optimizer_fields(OptimizerConfig(), torch.float32, Layout()))
    if kind == "DistributedDataParallelConfig":
        return set(ddp_fields(torch.float32, Layout()))
    model = ModelConfig(
        family="llama", vocab_size=1, hidden_size=1, ffn_hidden_size=1, num_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=2, max_position_embeddings=1, norm_epsilon=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    recompute = RecomputeConfig(checkpoint_activations=True)
    return set(transformer_fields(model, Layout(), torch.float32, recompute, 1, shapes_vary=False)) | {
        "recompute_modules"
    }
