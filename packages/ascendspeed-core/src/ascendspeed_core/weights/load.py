"""Put a source's weights into a model, each process reading only the slices that it holds."""

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.transformer import Transformer, empty_transformer
from ascendspeed_core.weights.source import CheckpointError, Index, WeightSource


def load_weights(model: Transformer, source: WeightSource) -> None:
    """Copy the weights of `source` into `model`, whole, cut, or one stage; formats are converted.

    Raises:
        CheckpointError: the source lacks a weight, has one too many, or one of another shape.
    """
    have = source.tensors()
    parameters = dict(model.named_parameters())
    where = source.path or source.kind
    for name in sorted(set(have) - parameter_shapes(model.config).keys()):
        raise CheckpointError(f"{where} holds {name}, which the model has no place for")
    for name, parameter in parameters.items():
        if name not in have:
            raise CheckpointError(f"{where} lacks {name}; it is another architecture or an incomplete copy")
        if have[name].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{where}: {name} has shape {list(have[name].shape)}, the model's is {list(parameter.shape)}; "
                "its config and its weights disagree"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            local = local_tensor(parameter)
            if local.numel():
                local.copy_(source.read(name, local_index(parameter)))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter of the whole model."""
    model = empty_transformer(config, torch.float32)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_index(tensor: torch.Tensor) -> Index:
    """Return which slice of the whole tensor this process holds; an empty tuple is all of it."""
    if not isinstance(tensor, DTensor):
        return ()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
