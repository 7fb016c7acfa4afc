"""Handlers: how a record becomes documents or samples."""

from ascendspeed_data.handlers.base import (
    IGNORED_LABEL,
    HandlerBase,
    Kind,
    Part,
    Sample,
    SampleHandler,
    TextHandler,
    kind_of,
)
from ascendspeed_data.handlers.registry import all_handlers, find_handler

__all__ = [
    "IGNORED_LABEL",
    "HandlerBase",
    "Kind",
    "Part",
    "Sample",
    "SampleHandler",
    "TextHandler",
    "all_handlers",
    "find_handler",
    "kind_of",
]
