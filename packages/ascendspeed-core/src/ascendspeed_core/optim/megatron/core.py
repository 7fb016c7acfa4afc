"""megatron-core itself: what is imported from it, where it computes, and what differs between its versions.

Whatever a version calls differently, or lacks, is asked for here and nowhere else. It is recognised by the signature of
what is called, not by a number: MindSpeed's 0.12.1 is patched, and releases between two versions have parts of both.
"""

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device, device_of_cuda_calls
from ascendspeed_core.megatron import megatron
from ascendspeed_data.errors import AscendSpeedError


def prepare(device: Device) -> str:
    """Make megatron-core ready for a device, and return its version.

    Raises:
        AscendSpeedError: it does not compute there.
    """
    adaptor = device.megatron_adaptor
    if adaptor is not None:
        try:
            importlib.import_module(adaptor)
        except ModuleNotFoundError as error:
            raise AscendSpeedError(
                f"engine=megatron on this {device.kind}: {error.name} is not installed, through which megatron-core "
                "computes there; install MindSpeed, or give --engine ascendspeed"
            ) from None
    # The module as megatron-core sees it, which may not be ours: it asks it for the device.
    found = device_of_cuda_calls(megatron("parallel_state").torch)
    if found is None or found.type != device.torch.type:
        raise AscendSpeedError(
            f"engine=megatron on this {device.kind}: megatron-core computes on GPUs and NPUs only, it asks torch for a "
            "GPU wherever it makes a tensor; give --engine ascendspeed, which computes the same numbers"
        )
    return str(megatron("package_info").__version__)


def check_sharded_optimizer() -> None:
    """Try what its distributed optimizer does after each update with FP8 weights, here with none of them.

    Raises:
        AscendSpeedError: it wants Transformer Engine for that, as megatron-core before 0.13 does.
    """
    try:
        megatron("fp8_utils").quantize_param_shard([], [], [], None)
    except RuntimeError:
        version = megatron("package_info").__version__
        raise AscendSpeedError(
            f"engine=megatron with use_distributed_optimizer=true: the one of megatron-core {version} wants "
            "Transformer Engine, which is not installed; install it, or megatron-core 0.13 or newer, or leave the "
            "option out"
        ) from None


def check_transformer_engine(fp8: str) -> None:
    """Try to import what multiplies in FP8.

    Args:
        fp8: the format that was asked for.

    Raises:
        AscendSpeedError: it is not installed.
    """
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        raise AscendSpeedError(
            f"engine=megatron with fp8={fp8}: Transformer Engine, whose linear layers multiply in FP8, cannot be "
            f"imported ({error}); install transformer-engine, or leave --fp8 out"
        ) from None


def start_groups(layout: Layout, stages_per_rank: int) -> None:
    """Make megatron-core's process groups; ranks are numbered as in `config.layout`."""
    state = megatron("parallel_state")
    state.destroy_model_parallel()
    # In 0.12 they stay as they were, and belong to groups that are gone.
    state._POSITION_EMBEDDING_GLOBAL_RANKS = None
    state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        virtual_pipeline_model_parallel_size=stages_per_rank if stages_per_rank > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )
    # Its model draws nothing that is used, but forks random states where it would.
    megatron("tensor_parallel.random").model_parallel_cuda_manual_seed(0)


def make_config(kind: str, fields: Mapping[str, Any], more: Mapping[str, Any]) -> Any:
    """Return one of its config objects.

    Args:
        kind: `TransformerConfig`, or `MLATransformerConfig` for latent attention, `OptimizerConfig` or
            `DistributedDataParallelConfig`.
        fields: that the engine sets; those that this version does not know are left out.
        more: fields of `--megatron-args`.

    Raises:
        AscendSpeedError: it refuses a value.
    """
    made = config_class(kind)
    known = inspect.signature(made).parameters
    try:
        with warnings.catch_warnings():
            # Its own defaults are deprecated by itself.
            warnings.simplefilter("ignore")
            return made(**{name: value for name, value in fields.items() if name in known}, **more)
    except (ValueError, AssertionError, TypeError) as error:
        version = megatron("package_info").__version__
        raise AscendSpeedError(
            f"engine=megatron: {kind} of megatron-core {version} refuses the run: "
            f"{(str(error) or repr(error)).rstrip('.')}; change --megatron-args, or the layout"
        ) from None


def config_class(kind: str) -> Any:
    """Return the class of one of its config objects."""
    modules = {
        "TransformerConfig": "transformer.transformer_config",
        "MLATransformerConfig": "transformer.transformer_config",
        "OptimizerConfig": "optimizer.optimizer_config",
        "DistributedDataParallelConfig": "distributed.distributed_data_parallel_config",
    }
    return getattr(megatron(modules[kind]), kind)


def make_gpt_model(stage: int, stages_per_rank: int, **arguments: Any) -> Any:
    """Return a `GPTModel`, one stage of a pipeline.

    Args:
        stage: which of the stages of this rank.
        stages_per_rank: how many it has.
        arguments: of `GPTModel`.
    """
    model = megatron("models.gpt.gpt_model").GPTModel
    if stages_per_rank > 1:
        if _takes(model.__init__, "vp_stage"):
            arguments["vp_stage"] = stage
        else:
            megatron("parallel_state").set_virtual_pipeline_model_parallel_rank(stage)
    return model(**arguments)


def submodules_of(spec: Any) -> Any:
    """Return what a layer is made of: of its spec, or from 0.18 on of what makes it."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def latent_attention() -> Any:
    """Return its class of multi-head latent attention."""
    module: Any = megatron("transformer.multi_latent_attention")
    if not isinstance(getattr(module, "TELinear", None), type):
        # Without Transformer Engine 0.16 has mocks of its classes, and asks whether a layer is an instance of one.
        module.HAVE_TE = False
    return module.MLASelfAttention


def mark_cut(parameter: torch.Tensor, dim: int) -> None:
    """Say that tensor-parallel ranks hold other parts of a parameter; otherwise the norm counts only the first's.

    megatron-core says so itself where it draws weights, which it is spared here.
    """
    if not getattr(parameter, "tensor_model_parallel", False):
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            parameter.__dict__.pop(name, None)
        megatron("tensor_parallel").set_tensor_model_parallel_attributes(parameter, True, dim, 1)


def make_optimizer(config: Any, chunks: Sequence[Any]) -> Any:
    """Return its optimizer, which decays matrices only, in all versions.

    Args:
        config: its `OptimizerConfig`.
        chunks: stages of this rank, wrapped in its `DistributedDataParallel`.
    """
    return megatron("optimizer").get_megatron_optimizer(config, list(chunks), use_gloo_process_groups=False)


def parts_of(optimizer: Any) -> list[Any]:
    """Return the optimizers that one consists of: of experts and of the rest."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def set_loss_scale(optimizer: Any, scale: float) -> None:
    """Let the next step divide gradients by a scale; made with a constant one, it never changes it by itself."""
    for part in parts_of(optimizer):
        scaler = getattr(part, "grad_scaler", None)
        if scaler is not None:
            scaler._scale.fill_(scale)


def set_num_steps(rule: torch.optim.Optimizer, num_steps: int) -> None:
    """Say how many updates there were; fused optimizers of other packages count in their groups, not in each state."""
    if not type(rule).__module__.startswith("torch."):
        for group in rule.param_groups:
            group["step"] = num_steps


def clip_gradients(optimizer: Any, norm: float, most: float) -> None:
    """Multiply the gradients of a whole model so that their norm is `most` at most."""
    clip = megatron("optimizer.clip_grads").clip_grad_by_total_norm_fp32
    for part in parts_of(optimizer):
        parameters = part.get_parameters()
        if parameters and parameters[0].dtype == torch.float64:
            # Its own function takes fp32 only; this is its rule.
            scale = min(most / (norm + 1e-6), 1.0)
            torch._foreach_mul_([parameter.grad for parameter in parameters], scale)
        elif parameters:
            clip(parameters, most, norm)


def forward_backward() -> Callable[..., Any]:
    """Return the schedule of the groups that were made."""
    found: Callable[..., Any] = megatron("pipeline_parallel.schedules").get_forward_backward_func()
    return found


def state_of(optimizer: Any, parameter: torch.Tensor) -> tuple[torch.Tensor, int, Any] | None:
    """Return what updates a parameter of the model on this rank.

    Args:
        optimizer: of `make_optimizer`.
        parameter: of a `GPTModel`.

    Returns:
        The weights that are updated, flat, the first element of the parameter that they are, and torch's optimizer that
        keeps their state; `None` where other ranks update all of it.
    """
    for part in parts_of(optimizer):
        groups = getattr(part, "model_param_group_index_map", None)
        if groups is not None:
            if parameter not in groups:
                continue
            group, position = groups[parameter]
            where = part._get_model_param_range_map(parameter)["param"]
            return part.optimizer.param_groups[group]["params"][position], where.start, part.optimizer
        held = getattr(parameter, "main_param", parameter)
        if part.optimizer is not None and any(
            held is own for group in part.optimizer.param_groups for own in group["params"]
        ):
            return held, 0, part.optimizer
    return None


def finalize_gradients(chunks: Sequence[Any]) -> None:
    """Sum the gradients over replicas, of what several ranks hold, and of a tied head; nothing is divided."""
    megatron("distributed.finalize_model_grads").finalize_model_grads(list(chunks))


def wait_for_parameters(chunks: Sequence[Any]) -> None:
    """Gather the weights that forwards have not asked for since the last update, where they wait for that.

    Args:
        chunks: stages of this rank, wrapped in its `DistributedDataParallel`.
    """
    for chunk in chunks:
        if not chunk.use_forward_hook:
            continue
        for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            if group.param_gather_handle is not None or not group.param_gather_dispatched:
                group.start_param_sync(force_sync=True)


def _takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters
