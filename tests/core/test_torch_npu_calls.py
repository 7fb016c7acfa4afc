"""What is asked of torch_npu exists there, with those parameters: checked against its wheel."""

import ast
import inspect
import re
from pathlib import Path

import ascendspeed_core.device
from support.npu_lookalike import NpuModule
from support.torch_npu_wheel import calls_of_device_modules, operators, runtime_functions

PACKAGES = Path(__file__).parents[2] / "packages"


def accepts(parameters: ast.arguments, positional: int, keywords: set[str]) -> bool:
    names = [parameter.arg for parameter in (*parameters.posonlyargs, *parameters.args)]
    required = len(names) - len(parameters.defaults)
    return required <= positional + len(keywords) and positional <= len(names) and keywords <= set(names)


def test_the_runtime_functions_that_are_called_exist() -> None:
    source = Path(ascendspeed_core.device.__file__).read_text()
    calls = list(calls_of_device_modules(source))
    assert {name for name, _ in calls} >= {
        "synchronize", "max_memory_allocated", "set_device", "device_count", "is_available", "get_rng_state",
        "set_rng_state",
    }  # fmt: skip
    for name, call in calls:
        assert name in runtime_functions(), f"torch_npu.npu has no {name}"
        keywords = {keyword.arg for keyword in call.keywords if keyword.arg}
        assert accepts(runtime_functions()[name], len(call.args), keywords), ast.unparse(call)


def test_the_lookalike_offers_nothing_that_torch_npu_lacks() -> None:
    for name, function in inspect.getmembers(NpuModule, inspect.isfunction):
        if name.startswith("_"):
            continue
        assert name in runtime_functions(), f"torch_npu.npu has no {name}"
        theirs = [parameter.arg for parameter in runtime_functions()[name].args]
        ours = list(inspect.signature(function).parameters)[1:]
        assert ours == theirs, name


def test_the_fused_operators_that_are_called_exist() -> None:
    assert "npu_fusion_attention" in operators()
    assert len(operators()) > 400
    for path in PACKAGES.glob("*/src/**/*.py"):
        for name in re.findall(r"(?:torch\.ops\.npu|torch_npu)\.(npu_\w+)", path.read_text()):
            assert name in operators(), f"{path}: torch_npu has no operator {name}"


def test_a_call_that_does_not_fit_is_found() -> None:
    (parsed,) = ast.parse("def f(new_state, device='npu'): pass").body
    assert isinstance(parsed, ast.FunctionDef)
    assert accepts(parsed.args, 1, set())
    assert accepts(parsed.args, 1, {"device"})
    assert not accepts(parsed.args, 0, set())
    assert not accepts(parsed.args, 3, set())
    assert not accepts(parsed.args, 1, {"index"})
