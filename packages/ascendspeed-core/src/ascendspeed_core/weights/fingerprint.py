"""Tell models apart without reading all of their weights."""

import hashlib

import torch

from ascendspeed_core.weights.source import WeightSource

SAMPLED_ELEMENTS = 4096


def fingerprint(source: WeightSource) -> str:
    """Return a SHA-256 of the architecture and of the first elements of every tensor.

    The same model has the same fingerprint in every kind of checkpoint and layout, as long as its weights are
    stored in the same format. Two trainings differ in nearly every element, so the first ones tell them apart.
    """
    digest = hashlib.sha256(source.config.model_dump_json().encode())
    for name, info in sorted(source.tensors().items()):
        digest.update(f"{name} {info.shape} {info.dtype}".encode())
        width = max(info.num_bytes // info.dtype.itemsize // max(info.shape[0], 1), 1)
        rows = min(info.shape[0], -(-SAMPLED_ELEMENTS // width))
        index = (slice(0, rows), *(slice(0, length) for length in info.shape[1:]))
        digest.update(source.read(name, index).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
