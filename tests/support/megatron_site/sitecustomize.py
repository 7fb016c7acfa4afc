"""For processes whose PYTHONPATH begins with this folder: megatron-core, when it is imported, computes on the CPU."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _MegatronOnCpu:
    """Finds `megatron.core` as Python does, and changes it once it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "megatron.core":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_install(module: ModuleType) -> None:
            execute(module)
            from support.megatron_on_cpu import install

            install()

        loader.exec_module = execute_and_install
        return spec


sys.meta_path.insert(0, _MegatronOnCpu())
