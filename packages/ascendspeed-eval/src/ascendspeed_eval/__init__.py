"""Benchmark scores that anyone can reproduce; installs and runs without torch."""

__version__ = "0.1.0"
