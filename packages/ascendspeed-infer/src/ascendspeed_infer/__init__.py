"""Generate text and score it from any checkpoint, under any layout."""

__version__ = "0.1.0"
