"""Import megatron-core: late, because it takes seconds, and without its warnings about extensions it can do without."""

import importlib
import logging
import warnings
from typing import Any


def megatron(module: str) -> Any:
    """Return `megatron.core.<module>`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("megatron.core").setLevel(logging.WARNING)
        return importlib.import_module(f"megatron.core.{module}")
