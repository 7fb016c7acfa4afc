"""Choose the device and its collective back end. Besides `kernels/`, the only file that names a device.

torch_npu without CANN makes `import torch` itself fail, so `prepare_torch` must run before the first import of
torch: it keeps torch_npu out for `--device cpu`, and turns the failure into advice otherwise.
"""

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
    "RTX 4090": 165, "V100": 125, "910B1": 386, "910B2": 376, "910B3": 313, "910B4": 280, "910A": 256, "910ProB": 256,
}  # fmt: skip
"""Dense operations per second in fp16, in 10^12, by a part of the device's name; the first that fits counts. Of the
makers' data sheets; 910B2 to 910B4 of Huawei's msmodeling (github.com/Ascend/msmodeling, tensor_cast/device.py), which
has bf16 6 to 12 % below. 910B1 is derived from its cores (planner/devices); for 910ProB no publication was found."""

TOOLKIT_SETUP = "/usr/local/Ascend/ascend-toolkit/set_env.sh"
"""Script that CANN installs, which sets its paths for a shell."""


@dataclass(frozen=True)
class ClusterFacts:
    """What the launchers of a cluster have to know of a kind of device.

    Attributes:
        slurm: option of sbatch that asks for `{count}` devices of each machine.
        kubernetes: name of the resource that the cluster's device plugin offers.
        setup: lines of a shell script before the first process starts.
        environment: variables of all processes.
        interface: variables that name the network interface.
    """

    slurm: str | None = None
    kubernetes: str | None = None
    setup: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    interface: tuple[str, ...] = ("GLOO_SOCKET_IFNAME",)


CLUSTERS = {
    "npu": ClusterFacts(
        "--gres=npu:{count}",
        "huawei.com/Ascend910",
        # Not there in an image that has set the paths itself.
        (f"if [ -f {TOOLKIT_SETUP} ]; then set +u; source {TOOLKIT_SETUP}; set -u; fi",),
        # Machines may start minutes apart, and HCCL waits 120 s; overflows must become infinite for the loss scale.
        (
            ("HCCL_CONNECT_TIMEOUT", "1200"),
            ("INF_NAN_MODE_ENABLE", "1"),
            ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True"),
        ),
        ("HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
    ),
    "cuda": ClusterFacts(
        "--gpus-per-node={count}",
        "nvidia.com/gpu",
        environment=(("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),),
        interface=("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
    ),
    "cpu": ClusterFacts(),
}
"""By kind of device."""

ClusterDevice = Literal["npu", "cuda", "cpu"]
"""Kinds of devices that a cluster may have."""

USUAL_CLUSTER: ClusterDevice = "npu"
"""What a cluster is taken to have."""

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


def device_of_cuda_calls(seen: Any) -> "torch.device | None":
    """Return where a program that calls `torch.cuda` computes; `None` where those calls find no device.

    Args:
        seen: torch as the program sees it. Adaptors give some programs another one, or change it for all.
    """
    if not seen.cuda.is_available():
        return None
    current = seen.cuda.current_device()
    return seen.device(current)  # type: ignore[no-any-return]


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
            f"torch_npu is installed but cannot load, most often because CANN is missing: source {TOOLKIT_SETUP}, or "
            "run with --device cpu "
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
    found = _found(wanted)
    kind = _kind(wanted, found)
    if wanted == "auto" and not quiet:
        log(f"device: {kind} (auto; found {', '.join(found)})")
    if kind != "cpu" and local_rank >= _count(kind):
        raise AscendSpeedError(
            f"process {local_rank} of this machine finds only {_count(kind)} {kind} devices; start fewer processes"
        )
    device = Device(kind, 0 if kind == "cpu" else local_rank)
    if kind != "cpu":
        import torch

        getattr(torch, kind).set_device(device.index)
    return device


def check_device_count(wanted: str, processes: int) -> str:
    """Return the kind of device that processes of this machine will take; nothing is started on it.

    Args:
        wanted: as `choose_device` takes it.
        processes: of this machine.

    Raises:
        AscendSpeedError: the device asked for is not there, or has fewer units than processes.
    """
    kind = _kind(wanted, _found(wanted))
    if kind != "cpu" and processes > _count(kind):
        raise AscendSpeedError(
            f"nproc_per_node={processes} needs as many devices, and this machine has {_count(kind)} of kind {kind}; "
            "start fewer processes, or take more machines (asd-core launch-command)"
        )
    return kind


def _found(wanted: str) -> list[str]:
    """Return the kinds of devices that are there, the first to be taken first."""
    prepare_torch(wanted)
    return [kind for kind in BACKENDS if _count(kind)]


def _kind(wanted: str, found: list[str]) -> str:
    kind = found[0] if wanted == "auto" else wanted
    if kind not in found:
        extra = "; install ascendspeed-core[npu] and CANN" if kind == "npu" else ""
        raise AscendSpeedError(f"device={kind} is not available here; found {', '.join(found)}{extra}")
    return kind


_DEVICE_FILES = {"npu": "davinci[0-9]*", "cuda": "nvidia[0-9]*"}
"""Files in /dev that the drivers make, one for each device; they are there without torch."""

_TOPOLOGY = {"npu": ("npu-smi", "info", "-t", "topo"), "cuda": ("nvidia-smi", "topo", "-m")}
"""Programs of the drivers that print how devices are joined."""

_LIBRARIES = {"npu": "torch_npu", "cuda": "torch"}


@dataclass(frozen=True)
class Hardware:
    """A kind of accelerator of this machine, as drivers show it and as torch does.

    Attributes:
        kind: of device.
        files: devices that the driver shows.
        seen: devices that torch sees.
        names: of these.
        memory_bytes: of each of these.
        joined: what the driver's program prints of how they are joined; `None` where it is not known.
        library: package through which torch sees them.
    """

    kind: str
    files: int
    seen: int
    names: tuple[str, ...]
    memory_bytes: tuple[int, ...]
    joined: str | None
    library: str


def hardware_here(has_torch: bool, devices: Path = Path("/dev")) -> list[Hardware]:
    """Return the kinds of accelerators of this machine.

    Args:
        has_torch: torch can be imported.
        devices: folder of the device files.
    """
    found = []
    for kind, pattern in _DEVICE_FILES.items():
        files, seen = len(list(devices.glob(pattern))), _count(kind) if has_torch else 0
        if files or seen:
            each = [Device(kind, index) for index in range(seen)]
            memory = tuple(one.memory_bytes() or 0 for one in each)
            names = tuple(one.name for one in each)
            found.append(Hardware(kind, files, seen, names, memory, _joined(kind), _LIBRARIES[kind]))
    return found


def _joined(kind: str) -> str | None:
    import subprocess

    try:
        done = subprocess.run(_TOPOLOGY[kind], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def toolkit_version(folder: Path | None = None) -> str | None:
    """Return the version of CANN that is installed; `None` where none is found.

    Args:
        folder: of the toolkit. [default: what set_env.sh set, else where CANN is installed by default]
    """
    import re

    default = Path(TOOLKIT_SETUP).parent / "latest"
    folder = folder or Path(os.environ.get("ASCEND_TOOLKIT_HOME", default))
    for file in (*folder.glob("*/ascend_toolkit_install.info"), folder / "version.cfg"):
        if file.is_file():
            found = re.search(
                r"(?:^version=|\[)(\d+\.[\w.]+)", file.read_text(encoding="utf-8", errors="replace"), re.M
            )
            if found:
                return found[1]
    return None


def _count(kind: str) -> int:
    import torch

    if kind == "cpu":
        return 1
    module = getattr(torch, kind, None)
    return int(module.device_count()) if module is not None and module.is_available() else 0
