"""Handlers: how a record becomes documents or samples."""

from ascendspeed_data.handlers.base import (
    IGNORED_LABEL,
    HandlerBase,
    Part,
    Sample,
    SampleHandler,
    TextHandler,
)
from ascendspeed_data.handlers.registry import all_handlers, find_handler

__all__ = [
    "IGNORED_LABEL",
    "HandlerBase",
    "Part",
    "Sample",
    "SampleHandler",
    "TextHandler",
    "all_handlers",
    "find_handler",
]
