"""Devices: torch_npu without CANN, and what is asked for but not there."""

from pathlib import Path

import pytest

from ascendspeed_core.device import BACKENDS, choose_device
from ascendspeed_data.errors import AscendSpeedError
from support.commands import run_command

BROKEN = 'raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")\n'


@pytest.fixture
def torch_npu_without_cann(tmp_path: Path) -> Path:
    """A torch_npu as an installed wheel has it, autoloaded by torch, that fails as it does without CANN."""
    package = tmp_path / "site"
    (package / "torch_npu").mkdir(parents=True)
    (package / "torch_npu" / "__init__.py").write_text(BROKEN + "def _autoload(): pass\n")
    info = package / "torch_npu-2.13.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return package


ARGUMENTS = ["asd-infer", "generate", "--load", "/nowhere/model", "--prompt", "x"]


def test_torch_npu_without_cann_says_what_to_do(torch_npu_without_cann: Path) -> None:
    done = run_command(*ARGUMENTS, PYTHONPATH=str(torch_npu_without_cann))
    assert done.status == 1
    assert "torch_npu is installed but cannot load" in done.complaint
    assert "set_env.sh, or run with --device cpu" in done.complaint
    assert "Traceback" not in done.stderr


def test_the_cpu_needs_no_cann(torch_npu_without_cann: Path) -> None:
    done = run_command(*ARGUMENTS, "--device", "cpu", PYTHONPATH=str(torch_npu_without_cann))
    assert "checkpoint /nowhere/model does not exist" in done.complaint


def test_help_needs_no_cann(torch_npu_without_cann: Path) -> None:
    done = run_command("asd-core", "pretrain", "--help", PYTHONPATH=str(torch_npu_without_cann))
    assert done.status == 0
    assert "--tensor-model-parallel-size" in done.stdout


def test_the_cpu_is_a_device_with_gloo() -> None:
    device = choose_device("cpu")
    assert (device.kind, device.backend, device.torch.type) == ("cpu", "gloo", "cpu")
    assert BACKENDS == {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
    assert device.peak_memory_bytes() > 10_000_000


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(
        AscendSpeedError, match=r"device=npu is not available here; .*ascendspeed-core\[npu\]"
    ):
        choose_device("npu")
