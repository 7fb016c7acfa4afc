"""megatron-core is imported without torch's compiler and without triton; what it has compiled still is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ascendspeed_core.megatron import _compiled_when_called, megatron
from support.commands import environment


def test_the_compiler_is_not_loaded() -> None:
    program = (
        "import sys\n"
        "from ascendspeed_core.megatron import megatron\n"
        "megatron('num_microbatches_calculator')\n"
        "assert 'megatron.core.tensor_parallel' in sys.modules\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_functions_are_compiled_once_when_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(len(inputs))
        return graph.forward

    # torch's compiler with a backend that keeps a record: inductor would need a C++ compiler.
    compile_with = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **more: compile_with(function, backend=compiler, **more)
    )
    before = torch.compile
    with _compiled_when_called():

        @torch.compile
        def twice(x: torch.Tensor) -> torch.Tensor:
            """Double."""
            return x + x

        with_options = torch.compile(lambda x: x * 3, dynamic=False)
    assert torch.compile is before
    assert (twice.__name__, twice.__doc__, compiled) == ("twice", "Double.", [])
    for _ in range(2):
        assert twice(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert compiled == [1]
    assert with_options(torch.ones(2)).tolist() == [3.0, 3.0]
    assert compiled == [1, 1]


KERNELS = """
import triton
import triton.language as tl

@triton.jit
def kernel(x, size: tl.constexpr):
    tl.store(x, size)
"""
PROGRAM = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
sys.modules["triton"] = None
try:
    importlib.import_module("megatron.core.transformer.moe.ops.paged_stash")
except ModuleNotFoundError:
    print("missed")
from ascendspeed_core.megatron import megatron
for name in ("paged_stash", "ops.paged_stash"):
    kernel = megatron(f"transformer.moe.{name}").kernel
    try:
        kernel[(1,)](0, 1)
    except ModuleNotFoundError as error:
        print(error)
print(megatron("transformer.moe.asks").has_triton, sum(type(one).__name__ == "_WithoutTriton" for one in sys.meta_path))
"""


def test_kernels_of_triton_are_there_without_it_and_fail_when_they_start(tmp_path: Path) -> None:
    """Two modules alone do not see that it is missing: others of megatron-core ask, and go on without."""
    folder = tmp_path / "megatron" / "core" / "transformer" / "moe" / "ops"
    folder.mkdir(parents=True)
    for parent in (folder, *folder.parents[:4]):
        (parent / "__init__.py").touch()
    for path in (folder, folder.parent):
        (path / "paged_stash.py").write_text(KERNELS)
    (folder.parent / "asks.py").write_text(
        "try:\n    import triton\n    has_triton = True\nexcept ImportError:\n    has_triton = False\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    failed = "triton is not installed, which this kernel of megatron-core needs"
    assert done.stdout.splitlines() == ["missed", failed, failed, "False 1"], done.stderr


def test_torchs_compile_is_back_after_a_failure() -> None:
    before = torch.compile
    with pytest.raises(ModuleNotFoundError):
        megatron("no_such_module")
    assert torch.compile is before
