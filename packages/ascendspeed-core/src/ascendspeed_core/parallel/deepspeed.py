"""DeepSpeed: start it, tell it who computes with whom, and spread a model's weights over processes (ZeRO-3).

The model stays the plain one. Tensor parallelism is ours, see `parallel.tensor`: DeepSpeed needs to know of it only
which parameters are cut, for the norm of the whole gradient, and which processes hold copies of the same parts.

ZeRO-3 (Rajbhandari et al., 2020, section 5.3) keeps 1/dp of every weight on a process. DeepSpeed's hooks put the
weights of a module together before it computes, forward and backward, and let them go after.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput, ModelOutput, Transformer, filled_in_turn
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import AscendSpeedError


def start_deepspeed(device: Device) -> Any:
    """Import DeepSpeed for a device, quiet, and without anything of an earlier process group.

    Raises:
        AscendSpeedError: it is not installed.
    """
    # DeepSpeed looks for a device by itself, and finds an accelerator although --device cpu was given.
    os.environ["DS_ACCELERATOR"] = device.kind
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        raise AscendSpeedError(
            f"{error.name} is not installed, which ZeRO needs; pip install ascendspeed-core[deepspeed]"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls torch's collectives by names that torch 2.13 renamed; each process would say so.
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
    # On a CPU it would compile an all-reduce in shared memory at its start, for two minutes, and fail without a
    # compiler. There is no public switch.
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    # Its tables of groups are global and outlive torch's groups, for instance from a model trained before.
    _forget_groups(importlib.import_module("deepspeed.utils.groups"))
    communication: Any = importlib.import_module("deepspeed.comm.comm")
    communication.cdb = None
    if not dist.is_initialized():
        # DeepSpeed would look for a job scheduler and wait for its processes.
        raise AscendSpeedError(
            "DeepSpeed needs a process group, even for one process; run a command with --zero-stage, or call "
            "torch.distributed.init_process_group first"
        )
    # zero.Init reads the number of the device from there.
    os.environ.setdefault("LOCAL_RANK", str(device.index))
    deepspeed.init_distributed(dist_backend=device.backend, verbose=False)
    return deepspeed


def _forget_groups(groups: Any) -> None:
    """Empty the tables of groups; 0.19.4 and older have no function for it."""
    forget = getattr(groups, "_release_process_group_references", None)
    if forget is not None:
        forget()
        return
    for name in ("EXPERT_PARALLEL_GROUP", "EXPERT_DATA_PARALLEL_GROUP"):
        getattr(groups, f"_{name}").clear()
        getattr(groups, f"_{name}_RANKS").clear()
    groups._ALL_TO_ALL_GROUP.clear()
    for name in (
        "WORLD",
        "ZERO_PARAM_INTRA_PARALLEL",
        "TENSOR_MODEL_PARALLEL",
        "MODEL_PARALLEL",
        "DATA_PARALLEL",
    ):
        setattr(groups, f"_{name}_GROUP", None)
    groups._MPU_TENSOR_MODEL_PARALLEL_WORLD_SIZE = groups._MPU_TENSOR_MODEL_PARALLEL_RANK = None
    groups.mesh_device = groups.mpu = None
    groups.expert_tensor_parallel_world_size = 1


class GroupsForDeepSpeed:
    """Our mesh under the names by which DeepSpeed asks Megatron-LM's `mpu`."""

    def __init__(self, mesh: ParallelMesh) -> None:
        assert mesh.mesh is not None
        self._mesh = mesh
        self._tp = mesh.mesh.get_group("tp")
        self._same_weights = mesh.group("replicas") or mesh.mesh.get_group("dp")

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Processes with the same weights: other samples, or other parts of a sequence."""
        return self._same_weights

    def get_data_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.layout.replicas

    def get_data_parallel_rank(self) -> int:
        """Which of them this one is."""
        return self._mesh.replica

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their numbers among all processes."""
        return dist.get_process_group_ranks(self._same_weights)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Processes with other parts of the model: those of tensor parallelism."""
        return self._tp

    def get_model_parallel_world_size(self) -> int:
        """How many they are."""
        return self._mesh.layout.tp

    def get_model_parallel_rank(self) -> int:
        """Which of them this one is."""
        return self._mesh.tp_rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def groups_for_deepspeed(mesh: ParallelMesh) -> GroupsForDeepSpeed | None:
    """Return the groups, or `None` where all processes are data parallel, which DeepSpeed assumes by itself."""
    return GroupsForDeepSpeed(mesh) if mesh.layout.tp > 1 else None


def partition_weights(
    model: Transformer,
    mesh: ParallelMesh,
    fill: Callable[[str, nn.Parameter], None],
    settings: Mapping[str, Any],
) -> Transformer:
    """Give a model without storage its weights, of which each data-parallel process keeps an equal share.

    One module after the other gets its storage, is filled, and is spread: besides its shares a process never holds
    more than the largest module.

    Args:
        model: on the meta device, cut by tensor parallelism.
        mesh: the mesh, with this rank's coordinates.
        fill: writes the weight of a name into a parameter, this rank's tensor-parallel part.
        settings: config of `deepspeed.initialize`.
    """
    deepspeed = start_deepspeed(mesh.device)
    group = groups_for_deepspeed(mesh)
    # Inner modules come first: zero.Init spreads all that is in a module.
    for module in filled_in_turn(model, mesh.device.torch, fill):
        deepspeed.zero.Init(
            module=module,
            data_parallel_group=None if group is None else group.get_data_parallel_group(),
            config_dict_or_path=dict(settings),
            dtype=next(module.parameters()).dtype,
            mpu=group,
        )
    _let_go_of_weights(model)
    return model


def answer_from_shares(model: Transformer, mesh: ParallelMesh, settings: Mapping[str, Any]) -> Any:
    """Let a model that was spread compute without being trained: all processes run the same passes.

    Args:
        model: of `partition_weights`.
        mesh: the mesh, with this rank's coordinates.
        settings: config of `deepspeed.initialize`.

    Returns:
        What must be kept for as long as the model is used.
    """
    deepspeed = importlib.import_module("deepspeed")
    refuse_missing_format(next(model.parameters()).dtype, mesh.device)
    engine, *_ = deepspeed.initialize(
        model=model, config=dict(settings), mpu=groups_for_deepspeed(mesh), dist_init_required=False
    )
    return engine


def refuse_missing_format(dtype: torch.dtype, device: Device) -> None:
    """Ask DeepSpeed whether it computes in a format on this device; on a CPU it does not in fp16.

    Raises:
        AscendSpeedError: it does not.
    """
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
    supported = {torch.float16: accelerator.is_fp16_supported, torch.bfloat16: accelerator.is_bf16_supported}
    if dtype in supported and not supported[dtype]():
        name = str(dtype).removeprefix("torch.")
        raise AscendSpeedError(
            f"dtype={name}: DeepSpeed does not compute in {name} on this {device.kind}; give another --dtype, or leave "
            "--zero-stage out"
        )


def _let_go_of_weights(model: Transformer) -> None:
    """Keep the graph of a forward pass from holding the weights that ZeRO-3 put together for it.

    A matrix product saves its weight for the backward pass, as a view that would keep the whole model's storage
    alive. What is saved instead is whose view it is: when it is needed, DeepSpeed has put the weight together again.
    (DeepSpeed's own way is to replace `torch.nn.functional.linear` for the whole process.)
    """
    forward, running = model.forward, [model.get_submodule("")]

    def pack(saved: torch.Tensor) -> Any:
        storage = saved.untyped_storage().data_ptr()
        for owner in running[0].parameters(recurse=False):
            if owner.numel() and owner.untyped_storage().data_ptr() == storage:
                return owner, saved.shape, saved.stride(), saved.storage_offset()
        return saved

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        owner, shape, stride, offset = kept
        whole: torch.Tensor = owner.detach()
        return whole.as_strided(shape, stride, offset)

    def lean_forward(batch: ModelInput) -> ModelOutput:
        if not torch.is_grad_enabled():
            return forward(batch)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return forward(batch)

    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_pre_hook(lambda module, _: running.__setitem__(0, module))
    model.forward = lean_forward  # type: ignore[method-assign]
