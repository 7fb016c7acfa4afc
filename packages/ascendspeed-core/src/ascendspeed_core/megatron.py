"""Import megatron-core: late, because it takes seconds, and without its warnings about extensions it can do without."""

import builtins
import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ascendspeed_core.device import HOST


def megatron(module: str) -> Any:
    """Return `megatron.core.<module>`."""
    spare_triton()
    with warnings.catch_warnings(), _compiled_when_called():
        warnings.simplefilter("ignore")
        logging.getLogger("megatron.core").setLevel(logging.WARNING)
        return importlib.import_module(f"megatron.core.{module}")


@contextmanager
def _compiled_when_called() -> Iterator[None]:
    """Let what is imported meanwhile decorate functions with `torch.compile` without loading the compiler yet.

    megatron-core decorates two dozen functions, and loading torch's compiler takes longer than all else it imports. It
    is loaded when the first of them is called. With options, `torch.compile` is torch's own.
    """
    import torch

    compile_now = torch.compile

    def compile_when_called(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None or options:
            return compile_now(function, **options)
        compiled: Callable[..., Any] | None = None

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                compiled = compile_now(function)
            return compiled(*args, **kwargs)

        return call

    torch.compile = compile_when_called  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


ASKS_FOR_TRITON = (
    "megatron.core.transformer.moe.paged_stash",
    "megatron.core.transformer.moe.ops.paged_stash",
)
"""Modules of megatron-core 0.18 and 0.19 that import triton without asking whether it is there, as others do."""


def spare_triton() -> None:
    """Let megatron-core be imported where triton is not installed: on CPUs, and with torch's builds for them.

    From 0.18 on it imports kernels that move the tokens of experts out of a GPU's memory (`moe_paged_stash`, off unless
    it is asked for) wherever it is imported itself. Without triton they are there, and fail when they are called.
    """
    if find_spec("triton") is None and not any(isinstance(one, _WithoutTriton) for one in sys.meta_path):
        sys.meta_path.insert(0, _WithoutTriton())


class _WithoutTriton:
    """Finds the modules that ask for triton as Python does, and gives them a stand-in for it, them alone."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name in ASKS_FOR_TRITON else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LoaderWithoutTriton(spec.loader.name, spec.loader.path)
        return spec


class _LoaderWithoutTriton(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        def import_most(name: str, *more: Any, **named: Any) -> Any:
            absent = name.split(".")[0] == "triton"
            return _NoTriton() if absent else builtins.__import__(name, *more, **named)

        # Its own import statements take this one; nobody else's do.
        module.__dict__["__builtins__"] = vars(builtins) | {"__import__": import_most}
        super().exec_module(module)


class _NoTriton:
    """Whatever is defined with triton; started, it fails."""

    def __getattr__(self, name: str) -> "_NoTriton":
        return self

    def __call__(self, *_: Any, **__: Any) -> "_NoTriton":
        return self

    def __getitem__(self, grid: Any) -> Any:
        raise ModuleNotFoundError("triton is not installed, which this kernel of megatron-core needs")


@contextmanager
def group_for_megatron() -> Iterator[None]:
    """Give megatron-core a process group where it wants one even for a single process."""
    import torch.distributed as dist

    if dist.is_initialized():
        yield
        return
    alone = dist.HashStore()  # type: ignore[attr-defined] # public, but not listed
    dist.init_process_group(HOST.backend, store=alone, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
