"""A device that looks like an NPU to torch and computes on the CPU.

It shows whether code moves its tensors to the device, asks it for nothing that torch_npu lacks, and communicates
through its back end. It says nothing of an NPU's numbers, memory or speed: the CPU computes everything.

A tensor on the device is a wrapper around one on the CPU. Factories make wrappers; every other operation unwraps its
arguments, runs on the CPU, and wraps what comes out. torch_npu's fused operators are those of `npu_operators`. torch
loads this module as it loads torch_npu: by an entry point of the group `torch.backends`, see `pretended_package`.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from support import npu_operators

aten = torch.ops.aten
CPU = torch.device("cpu")

FACTORIES = (
    "empty.memory_format", "empty_strided.default", "zeros.default", "ones.default", "full.default",
    "arange.default", "arange.start", "arange.start_step", "rand.default", "randn.default", "randint.default",
    "randint.low", "scalar_tensor.default",
)  # fmt: skip
"""Operations that make a tensor of nothing, so that no argument tells which device they run on."""


SUMMING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor", "reduce_scatter_single")
COLLECTIVES = (
    *SUMMING, "all_gather", "all_gather_into_tensor", "all_gather_single", "all_to_all", "all_to_all_single",
    "broadcast", "gather", "scatter", "send", "recv",
)  # fmt: skip
SUMMED = (
    torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
)  # fmt: skip
"""What HCCL adds up, by `checkSupportedDataType` of torch_npu's ProcessGroupHCCL."""


class NpuModule:
    """What `torch.npu` offers, as far as torch itself and this project ask for it."""

    def __init__(self, device_count: int) -> None:
        self._count, self._current = device_count, 0
        self._rng_states: dict[int, torch.Tensor] = {}

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return self._count

    def current_device(self) -> int:
        return self._current

    def set_device(self, device: int) -> None:
        self._current = int(device)

    def get_device_name(self, device_name: int | None = None) -> str:
        return "look-alike"

    def get_device_properties(self, device_name: int | None = None) -> SimpleNamespace:
        return SimpleNamespace(total_memory=8 << 30)

    def synchronize(self, device: int | None = None) -> None:
        pass

    def max_memory_allocated(self, device: int | None = None) -> int:
        return 1 << 20

    def manual_seed(self, seed: int) -> None:
        self._rng_states[self._current] = torch.Generator().manual_seed(seed).get_state()

    def manual_seed_all(self, seed: int) -> None:
        for device in range(self._count):
            self._rng_states[device] = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: int = 0) -> torch.Tensor:
        return self._rng_states.setdefault(device, torch.Generator().get_state()).clone()

    def set_rng_state(self, new_state: torch.Tensor, device: int = 0) -> None:
        self._rng_states[device] = new_state.clone()


class NpuTensor(torch.Tensor):
    """A tensor whose numbers are in `on_cpu`."""

    on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor) -> "NpuTensor":
        tensor: NpuTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            # torch's autograd knows one device of a back end that is written in Python.
            device=torch.device("npu", 0),
        )
        tensor.on_cpu = on_cpu
        return tensor

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        # torch swaps sizes and strides, and knows nothing of what is wrapped.
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.on_cpu = value.on_cpu  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _unwrap(value: Any) -> Any:
    if isinstance(value, NpuTensor):
        return value.on_cpu
    return CPU if isinstance(value, torch.device) and value.type == "npu" else value


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is aten._to_copy.default:
        copied = func(_unwrap(args[0]), **tree_map(_unwrap, kwargs))
        wanted = kwargs.get("device", args[0].device)
        return NpuTensor(copied) if wanted.type == "npu" else copied
    if func is aten.copy_.default:
        _unwrap(args[0]).copy_(_unwrap(args[1]))
        return args[0]
    if func is aten._local_scalar_dense.default:
        return args[0].on_cpu.item()
    result = func(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
    given: list[NpuTensor] = []
    tree_map(lambda value: given.append(value) if isinstance(value, NpuTensor) else None, (args, kwargs))

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        # What an operation changed in place comes back as the wrapper that went in.
        for tensor in given:
            if tensor.on_cpu is value:
                return tensor
        return NpuTensor(value)

    return tree_map(wrap, result)


def _factory(operation: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        if kwargs.get("layout") is None:
            kwargs.pop("layout", None)
        return NpuTensor(operation(*args, **{**kwargs, "device": CPU}))

    return make


def _collectives(store: Any, rank: int, size: int, timeout: Any) -> Any:
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def _checked(collective: Callable[..., Any], is_summing: bool) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if dist.get_backend(kwargs.get("group")) == "hccl":
            tensors: list[torch.Tensor] = []
            tree_map(lambda value: tensors.append(value) if isinstance(value, torch.Tensor) else None, args)
            for tensor in tensors:
                if tensor.device.type != "npu":
                    raise RuntimeError(f"{collective.__name__}: HCCL moves no tensor of {tensor.device.type}")
                if is_summing and tensor.dtype not in SUMMED:
                    raise RuntimeError(f"HCCL {collective.__name__}: Unsupported data type {tensor.dtype}")
        return collective(*args, **kwargs)

    return call


_library = torch.library.Library("aten", "IMPL")


def install() -> None:
    """Make `npu` a device of torch, and `hccl` its collective back end."""
    _setup_privateuseone_for_python_backend("npu", backend_module=NpuModule(device_count=8))
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload)
        _library.impl(name.removesuffix(".default"), _factory(operation), "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    npu_operators.install()
    # Unwrapped tensors are on the CPU, so the group must take these too.
    dist.Backend.register_backend("hccl", _collectives, devices=["npu", "cpu"])
    for name in COLLECTIVES:
        if hasattr(dist, name):
            setattr(dist, name, _checked(getattr(dist, name), name in SUMMING))


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _unwrap(target).copy_(_unwrap(source))
    return target


def pretended_package(folder: Path) -> Path:
    """Make a folder that, on PYTHONPATH, lets torch find this device as it finds an installed torch_npu."""
    info = folder / "npu_lookalike-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: npu_lookalike\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[torch.backends]\nnpu_lookalike = {__name__}:install\n")
    return folder
