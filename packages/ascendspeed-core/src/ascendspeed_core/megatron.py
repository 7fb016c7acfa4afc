"""Import megatron-core: late, because it takes seconds, and without its warnings about extensions it can do without."""

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from ascendspeed_core.device import HOST


def megatron(module: str) -> Any:
    """Return `megatron.core.<module>`."""
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
