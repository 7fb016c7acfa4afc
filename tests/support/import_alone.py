"""Import every module of a package by itself: `python tests/support/import_alone.py PACKAGE`, one line per failure.

Each module is imported in a forked process, which has the libraries of others and nothing of this project. So an
import that works only after another one of ours fails here. Libraries that are not installed are skipped; modules
import them where they use them.
"""

import gc
import importlib
import os
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = (
    "numpy", "pydantic", "typer", "httpx", "jinja2", "yaml", "tokenizers", "sentencepiece", "pyarrow.parquet",
    "zstandard", "torch", "torch.distributed.tensor", "torch.distributed.pipelining", "safetensors.torch",
    "megatron.core.datasets.gpt_dataset",
)  # fmt: skip
"""Imported before forking, because they take seconds."""


def modules_of(package: str) -> list[str]:
    """Return the package and all modules in it."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    names = {
        ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in root.rglob("*.py")
    }
    return sorted(names)


def fails_alone(module: str) -> bool:
    """Import a module in a forked process, and print the last line of its error."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] != 0
    try:
        importlib.import_module(module)
    except BaseException:  # noqa: BLE001 - whatever it is, the module fails
        print(f"{module}: {traceback.format_exc().splitlines()[-1]}", flush=True)
        os._exit(1)
    os._exit(0)


def main(package: str, libraries: list[str]) -> int:
    """Return 1 if a module of the package cannot be imported by itself."""
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError:
            continue
    gc.disable()
    gc.freeze()
    ours = {name for name in sys.modules if name.startswith("ascendspeed")}
    assert not ours, ours
    return int(bool([module for module in modules_of(package) if fails_alone(module)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], list(LIBRARIES) if "--libraries" in sys.argv else []))
