"""Handlers turn a record into documents of text or into samples with labels."""

from ascendspeed_data.handlers.base import HandlerBase, Kind, SampleHandler, TextHandler, kind_of
from ascendspeed_data.handlers.registry import all_handlers, find_handler
from ascendspeed_data.sample import IGNORED_LABEL, Record, Sample, Segment, text_in

__all__ = [
    "IGNORED_LABEL",
    "HandlerBase",
    "Kind",
    "Record",
    "Sample",
    "SampleHandler",
    "Segment",
    "TextHandler",
    "all_handlers",
    "find_handler",
    "kind_of",
    "text_in",
]
