"""What torch_npu offers, read from its wheel: nothing of it is installed or imported, and CANN is not needed."""

import ast
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

VERSION = "2.13.0"
CACHE = Path(tempfile.gettempdir()) / f"torch_npu-{VERSION}-wheel"


@cache
def wheel() -> zipfile.ZipFile:
    """Return the wheel, downloaded once for a machine."""
    found = sorted(CACHE.glob("*.whl"))
    if not found:
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as scratch:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--platform",
                 "manylinux_2_28_x86_64", "--python-version", "3.11", "--dest", scratch, f"torch_npu=={VERSION}"],
                check=True,
            )  # fmt: skip
            CACHE.mkdir(exist_ok=True)
            (downloaded,) = Path(scratch).glob("*.whl")
            downloaded.replace(CACHE / downloaded.name)
        found = sorted(CACHE.glob("*.whl"))
    return zipfile.ZipFile(found[0])


@cache
def runtime_functions() -> dict[str, ast.arguments]:
    """Return name and parameters of every function of `torch_npu.npu`."""
    exported = set(_strings_of("__all__", "torch_npu/npu/__init__.py"))
    functions = {}
    for name in wheel().namelist():
        if name.startswith("torch_npu/npu/") and name.endswith(".py") and name.count("/") == 2:
            for node in ast.parse(wheel().read(name)).body:
                if isinstance(node, ast.FunctionDef) and node.name in exported:
                    functions[node.name] = node.args
    return functions


@cache
def operators() -> dict[str, str]:
    """Return name and schema of every operator `torch.ops.npu.*`."""
    import yaml

    schemas = {}
    for name in ("npu_native_functions.yaml", "npu_native_functions_by_codegen.yaml"):
        sections = yaml.safe_load(wheel().read(f"torch_npu/csrc/aten/{name}"))
        for section in ("custom", "custom_autograd", "quant", "symint"):
            for entry in sections.get(section) or []:
                schema = entry["func"] if isinstance(entry, dict) else entry
                if isinstance(schema, str) and "->" in schema:
                    schemas[schema.partition("(")[0].strip()] = schema
    return schemas


def calls_of_device_modules(source: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield name and call of each `getattr(torch, KIND).NAME(...)`, the only way this project asks a device."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        is_looked_up = isinstance(owner, ast.Call) and ast.unparse(owner.func) == "getattr"
        if is_looked_up or (isinstance(owner, ast.Name) and owner.id == "module"):
            yield node.func.attr, node


def _strings_of(variable: str, file: str) -> list[str]:
    for node in ast.parse(wheel().read(file)).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable:
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{file} has no {variable}")
