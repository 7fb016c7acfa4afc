"""Convert, inspect and verify checkpoints of large language models."""

__version__ = "0.1.0"
