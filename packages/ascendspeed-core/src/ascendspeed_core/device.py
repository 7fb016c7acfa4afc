"""Choose the device and its collective back end. Besides `kernels/`, the only file that names a device.

torch_npu without CANN makes `import torch` itself fail, so `prepare_torch` must run before the first import of
torch: it keeps torch_npu out for `--device cpu`, and turns the failure into advice otherwise.
"""

import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
"""Collective back end of each device."""

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

    def peak_memory_bytes(self) -> int:
        """Most memory that tensors held on the accelerator, or that the process held on a CPU."""
        import resource

        import torch

        if self.kind == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(getattr(torch, self.kind).max_memory_allocated(self.index))

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
