"""The state of a model in an external file: its tensors by name, and what lies between them and is none."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascendspeed_core.weights.files.file_tensor import StoredTensor
from ascendspeed_core.weights.files.torch_files import InertObject
from ascendspeed_core.weights.source import CheckpointError

EXTRA_STATE = "_extra_state"
"""Under which Transformer Engine keeps its history of fp8 scales; weights beside it are plain numbers."""
EXTRA_STATE_REASON = "Transformer Engine's history of fp8 scales, not a weight"


@dataclass(frozen=True)
class ModelState:
    """What one file holds of a model, or of one chunk of it.

    Attributes:
        tensors: by name, parts joined by dots; what is used is taken out.
        left_out: names of what is no weight, with the reason for which it is left out.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def model_state(content: Any, path: Path) -> ModelState:
    """Return the tensors of nested dictionaries.

    Args:
        content: of a file, or of a part of it.
        path: of the file, for messages.

    Raises:
        CheckpointError: an object that could be a tensor of a kind that is not read stands among them.
    """
    state = ModelState()
    _collect(content, "", path, state)
    return state


def _collect(content: Any, name: str, path: Path, state: ModelState) -> None:
    if isinstance(content, dict):
        for key, value in content.items():
            _collect(value, f"{name}.{key}" if name else str(key), path, state)
    elif name.endswith(EXTRA_STATE):
        is_empty = content is None or (isinstance(content, StoredTensor) and 0 in content.info.shape)
        state.left_out[name] = "empty" if is_empty else EXTRA_STATE_REASON
    elif isinstance(content, StoredTensor):
        state.tensors[name] = content
    elif isinstance(content, InertObject):
        kind = f"{type(content).__module__}.{type(content).__name__}"
        raise CheckpointError(
            f"{path}: {name or 'the model'} is an object of {kind}, not a tensor that is read; save plain tensors, "
            "such as those of the model's state_dict()"
        )
    elif content is not None:
        state.left_out[name] = f"{content!r:.40}, which is no tensor"
