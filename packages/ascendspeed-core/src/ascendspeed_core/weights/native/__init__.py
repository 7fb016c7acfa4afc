"""Checkpoints of this project: torch's distributed checkpoint with a description."""
