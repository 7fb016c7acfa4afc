"""Benchmarks: their prompts and how their answers are scored."""
