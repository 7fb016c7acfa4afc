"""Checkpoints of other systems whose tensors are packed and cut: how, in tables that serve reading and writing."""
