"""Tensors in files: safetensors, torch archives, read by slice and written in a stream."""
