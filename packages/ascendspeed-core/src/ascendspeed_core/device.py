"""Choose the device and its collective back end. Besides `kernels/`, the only file that names a device.

torch_npu without CANN makes `import torch` itself fail, so `prepare_torch` must run before the first import of
torch: it keeps torch_npu out for `--device cpu`, and turns the failure into advice otherwise.
"""

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
"""Collective back end of each device."""

NO_FLOAT64_SUMS = frozenset(("hccl",))
"""Back ends that move float64 between ranks but do not add it up (torch_npu's ProcessGroupHCCL, HCCL's AllReduce)."""

PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "H20": 148, "A100": 312, "A800": 312, "L40S": 362,
    "RTX 4090": 165, "V100": 125, "910B1": 414, "910B2": 376, "910B3": 313, "910B4": 280, "910A": 256, "910ProB": 256,
}  # fmt: skip
"""Dense 16-bit operations per second of the makers' data sheets, in 10^12, by a part of the device's name; the first
that fits counts."""

DeviceChoice = Literal["auto", "npu", "cuda", "cpu"]
"""What `--device` takes; `auto` takes the first that is there."""


@dataclass(frozen=True)
class Device:
    """The device of this process.

    Attributes:
        kind: `npu`, `cuda` or `cpu`.
        index: number of the accelerator on this machine; 0 for `cpu`.
    """

    kind: str
    index: int = 0

    @property
    def torch(self) -> "torch.device":
        """The same as torch names it."""
        import torch

        return torch.device(self.kind) if self.kind == "cpu" else torch.device(self.kind, self.index)

    @property
    def backend(self) -> str:
        """Collective back end for `torch.distributed`."""
        return BACKENDS[self.kind]

    def synchronize(self) -> None:
        """Wait until the device has finished what was asked of it."""
        import torch

        if self.kind != "cpu":
            getattr(torch, self.kind).synchronize(self.index)

    def computing_seconds(self) -> float:
        """Return a clock of what this process computes: on a CPU its processor time, which other work stretches least.

        Elsewhere it is the time of day, after `synchronize`.
        """
        return time.process_time() if self.kind == "cpu" else time.perf_counter()

    def peak_memory_bytes(self) -> int:
        """Most memory that tensors held on the accelerator, or that the process held on a CPU."""
        import resource

        import torch

        if self.kind == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(getattr(torch, self.kind).max_memory_allocated(self.index))

    def memory_bytes(self) -> int | None:
        """Return the memory of the accelerator; `None` on a CPU, whose memory belongs to the whole machine."""
        import torch

        if self.kind == "cpu":
            return None
        return int(getattr(torch, self.kind).get_device_properties(self.index).total_memory)

    @property
    def name(self) -> str:
        """What the maker calls the accelerator, for example `NVIDIA H100 80GB HBM3`; `cpu` for a CPU."""
        import torch

        return "cpu" if self.kind == "cpu" else str(getattr(torch, self.kind).get_device_name(self.index))

    def peak_flops(self, dtype_name: str) -> float | None:
        """Return the operations per second that the maker states for dense 16-bit products; `None` where unknown."""
        if dtype_name not in ("bfloat16", "float16"):
            return None
        name = self.name.lower()
        found = [tflops for part, tflops in PEAK_TFLOPS.items() if part.lower() in name]
        return found[0] * 1e12 if found else None

    @property
    def megatron_adaptor(self) -> str | None:
        """Module through which megatron-core computes on this kind of device; `None` where it does by itself."""
        return "mindspeed.megatron_adaptor" if self.kind == "npu" else None

    @property
    def can_record(self) -> bool:
        """Whether what is asked of the accelerator can be recorded, and asked again at once."""
        return self.kind == "cuda"

    def record(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Record what some work asks of the accelerator, without what the host computes meanwhile.

        Args:
            work: reads and writes tensors that stay where they are; asks the accelerator for nothing but kernels.

        Returns:
            What asks for the same again, and what the work returned, which it then writes anew.
        """
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # What is made or compiled at first use must not be recorded.
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        return graph.replay, result

    def profiler(self) -> Any:
        """Return torch's profiler of this kind of device: `start`, `stop`, `export_chrome_trace(path)`."""
        if self.kind == "npu":
            from torch_npu import profiler
        else:
            from torch import profiler

        activities = [profiler.ProfilerActivity.CPU]
        if self.kind != "cpu":
            activities.append(getattr(profiler.ProfilerActivity, self.kind.upper()))
        return profiler.profile(activities=activities)

    def rng_state(self) -> "Tensor | None":
        """Return the state of the accelerator's random numbers; `None` on a CPU, whose state torch keeps."""
        if self.kind == "cpu":
            return None
        import torch

        state: Tensor = getattr(torch, self.kind).get_rng_state(self.index)
        return state

    def set_rng_state(self, state: "Tensor") -> None:
        """Take over what `rng_state` of an accelerator gave."""
        import torch

        getattr(torch, self.kind).set_rng_state(state, self.index)


def device_of_cuda_calls(module: Any) -> "torch.device | None":
    """Return where a program that calls `torch.cuda` computes; `None` where those calls find no device.

    Args:
        module: torch as the program sees it. Adaptors give some programs another one, or change it for all.
    """
    if not module.cuda.is_available():
        return None
    current = module.cuda.current_device()
    return module.device(current)  # type: ignore[no-any-return]


HOST = Device("cpu")
"""The machine itself: where files are read, and where conversions run."""


def prepare_torch(wanted: str) -> None:
    """Import torch, with torch_npu kept out when the CPU was asked for by name.

    Raises:
        AscendSpeedError: torch cannot be imported; the message says what to do.
    """
    if wanted == "cpu":
        os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        importlib.import_module("torch")
    except RuntimeError as error:
        if "torch_npu" not in str(error):
            raise
        raise AscendSpeedError(
            "torch_npu is installed but cannot load, most often because CANN is missing: source "
            "/usr/local/Ascend/ascend-toolkit/set_env.sh, or run with --device cpu "
            "(TORCH_DEVICE_BACKEND_AUTOLOAD=0 does the same for every program); "
            f"torch said: {str(error).splitlines()[0]}"
        ) from None
    except ModuleNotFoundError as error:
        raise AscendSpeedError(f"{error.name} is not installed; install torch first") from None


def choose_device(wanted: str, local_rank: int = 0, quiet: bool = False) -> Device:
    """Return the device of this process.

    Args:
        wanted: `auto`, `npu`, `cuda` or `cpu`; `auto` takes the first that is there, in this order, and says so.
        local_rank: number of this process on its machine; it takes the accelerator of that number.
        quiet: do not say which device `auto` took.

    Raises:
        AscendSpeedError: the device asked for is not there, or has fewer units than processes.
    """
    prepare_torch(wanted)
    found = [kind for kind in BACKENDS if _count(kind)]
    kind = found[0] if wanted == "auto" else wanted
    if wanted == "auto" and not quiet:
        log(f"device: {kind} (auto; found {', '.join(found)})")
    if kind not in found:
        extra = "; install ascendspeed-core[npu] and CANN" if kind == "npu" else ""
        raise AscendSpeedError(f"device={kind} is not available here; found {', '.join(found)}{extra}")
    if kind != "cpu" and local_rank >= _count(kind):
        raise AscendSpeedError(
            f"process {local_rank} of this machine finds only {_count(kind)} {kind} devices; start fewer processes"
        )
    device = Device(kind, 0 if kind == "cpu" else local_rank)
    if kind != "cpu":
        import torch

        getattr(torch, kind).set_device(device.index)
    return device


def _count(kind: str) -> int:
    import torch

    if kind == "cpu":
        return 1
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0
