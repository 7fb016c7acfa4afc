"""Import megatron-core: late, because it takes seconds, and without its warnings about extensions it can do without."""

import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ascendspeed_core.device import HOST


def megatron(module: str) -> Any:
    """Return `megatron.core.<module>`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("megatron.core").setLevel(logging.WARNING)
        return importlib.import_module(f"megatron.core.{module}")


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
