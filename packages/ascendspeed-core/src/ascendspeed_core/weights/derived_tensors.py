"""Tensors in files that are no weights, but repeat what the config says: rotary frequencies, masks, positions.

Older programs stored such buffers beside the weights. None is left out for its name alone: each is compared with what
it must be, and one that differs is an error, since the model was then computed in another way than its config says.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.models.layer import attention_kind
from ascendspeed_core.models.position import RotaryKind, magnitude_of, rotary_frequencies
from ascendspeed_core.weights.source import CheckpointError, ReadableTensor

_NARROW = (torch.float16, torch.bfloat16)
_RELATIVE_ERROR = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Of one rounding to these formats."""
_SMALLEST = {torch.float16: 2**-25, torch.bfloat16: 0.0}
"""Half a step between the smallest numbers of these formats."""
_COMPUTED = 1e-5
"""How far two ways of computing a power in fp32 lie apart, relatively."""


@dataclass(frozen=True)
class DerivedTensor:
    """A kind of tensor that repeats what is known without it.

    Attributes:
        pattern: of its name, a regular expression over its end.
        what: in words.
        check: raises `ValueError` with what is wrong about a tensor; returns what it equals.
    """

    pattern: str
    what: str
    check: Callable[[torch.Tensor, ModelConfig], str]


def derived_reason(name: str, tensor: ReadableTensor, config: ModelConfig, where: object) -> str | None:
    """Say why a tensor that is no weight of the model may be left out.

    Args:
        name: in its file.
        tensor: the tensor; it is read.
        config: the model.
        where: the file or folder, for messages.

    Returns:
        What it equals, or `None` if nothing is known of such a tensor.

    Raises:
        CheckpointError: it contradicts the config.
    """
    for kind in DERIVED:
        if re.search(rf"(^|\.){kind.pattern}$", name):
            try:
                return kind.check(tensor.read(), config)
            except ValueError as error:
                raise CheckpointError(
                    f"{where}: {name} holds {kind.what}, {error}; correct the config, or use the one that belongs to "
                    "these weights"
                ) from None
    return None


def _check_frequencies(stored: torch.Tensor, config: ModelConfig) -> str:
    for kind, words in _rotary_kinds(config):
        if _is_close(stored, rotary_frequencies(kind)):
            return f"equal to the frequencies of {words}"
    raise ValueError(f"which are not those of {_rotary_words(config)}")


def _check_cosines(stored: torch.Tensor, config: ModelConfig) -> str:
    return _check_angles(stored, config, torch.cos)


def _check_sines(stored: torch.Tensor, config: ModelConfig) -> str:
    return _check_angles(stored, config, torch.sin)


def _check_angles(
    stored: torch.Tensor, config: ModelConfig, function: Callable[[torch.Tensor], torch.Tensor]
) -> str:
    for kind, words in _rotary_kinds(config):
        if stored.dim() < 2 or stored.shape[-1] not in (kind.dim, kind.dim // 2):
            continue
        angles = torch.arange(stored.shape[-2]).float().outer(rotary_frequencies(kind))
        angles = torch.cat([angles, angles], -1)[:, : stored.shape[-1]]
        expected = function(angles) * magnitude_of(kind.scaling)
        # An angle of position p is off by p times the error of a frequency, 2^-24, and its rounding.
        tolerance = 2**-7 if stored.dtype in _NARROW else 1e-5 + 2**-22 * stored.shape[-2]
        if torch.allclose(stored.double(), expected.double().expand(stored.shape), rtol=0, atol=tolerance):
            return f"equal to that of {words}"
    raise ValueError(f"which are not those of {_rotary_words(config)}")


def _check_causal(stored: torch.Tensor, config: ModelConfig) -> str:
    if stored.dim() < 2 or stored.shape[-1] != stored.shape[-2] or not stored.numel():
        raise ValueError(f"but has shape {list(stored.shape)}")
    square = stored.reshape(-1, *stored.shape[-2:]).double()
    lower = torch.ones(square.shape[-2:], dtype=torch.float64).tril()
    is_added = float(square.min()) < 0
    seen, hidden = square[:, lower.bool()], square[:, ~lower.bool()]
    is_causal = bool((seen == (0 if is_added else 1)).all()) and bool(
        (hidden < -1e4 if is_added else hidden == 0).all() if hidden.numel() else True
    )
    # The other way round: true where nothing is seen.
    is_turned = not is_added and bool((seen == 0).all()) and bool((hidden == 1).all())
    # Where layers differ, nothing here says whose mask it is.
    is_windowed = config.sliding_window is not None and config.sliding_window < stored.shape[-1]
    if not (is_causal or is_turned) or is_windowed:
        raise ValueError("which is not the causal mask that the config means")
    return "the causal mask, which is computed"


def _check_positions(stored: torch.Tensor, config: ModelConfig) -> str:
    if not torch.equal(stored.flatten().long(), torch.arange(stored.numel())):
        raise ValueError("which do not count from 0")
    return "positions, which count from 0"


def _check_masked(stored: torch.Tensor, config: ModelConfig) -> str:
    if stored.numel() != 1 or float(stored) > -1e4:
        raise ValueError("which is no number below -10,000")
    return f"{float(stored):g}, which stands for keys that are not seen"


DERIVED = (
    DerivedTensor(r"rotary(_pos)?_emb\.(original_)?inv_freq", "rotary frequencies", _check_frequencies),
    DerivedTensor(r"rotary(_pos)?_emb\.cos_cached", "cosines of rotary positions", _check_cosines),
    DerivedTensor(r"rotary(_pos)?_emb\.sin_cached", "sines of rotary positions", _check_sines),
    DerivedTensor(r"(self_)?(attn|attention)\.(bias|causal_mask)", "a mask", _check_causal),
    DerivedTensor(r"(causal|future)_mask", "a mask", _check_causal),
    DerivedTensor(r"masked_bias", "the score of keys that are not seen", _check_masked),
    DerivedTensor(r"position_ids", "positions", _check_positions),
)
"""What is recognised, and compared."""


def _rotary_kinds(config: ModelConfig) -> list[tuple[RotaryKind, str]]:
    """Return the rotary embeddings of the layers; before scaling too, which some programs applied to positions."""
    kinds = dict.fromkeys(attention_kind(config, layer).rotary for layer in range(config.num_layers))
    found = []
    for kind in (kind for kind in kinds if kind is not None):
        found.append((kind, _words(kind)))
        if kind.scaling is not None:
            bare = replace(kind, scaling=None)
            found.append((bare, f"{_words(bare)}, before scaling"))
    return found


def _rotary_words(config: ModelConfig) -> str:
    kinds = _rotary_kinds(config)
    return " or ".join(words for _, words in kinds) or f"position={config.position}, which has none"


def _words(kind: RotaryKind) -> str:
    scaling = f" with {kind.scaling.kind} scaling" if kind.scaling is not None else ""
    return f"rotary_base={kind.base:g} and {kind.dim // 2} pairs{scaling}"


def _is_close(stored: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare as exactly as the numbers allow: rounded to 16 bits, if that is what they are, or computed in fp32."""
    if stored.shape != expected.shape:
        return False
    values, wanted = stored.double(), expected.double()
    if torch.allclose(values, wanted, rtol=_COMPUTED, atol=0):
        return True
    for dtype in _NARROW:
        is_rounded = torch.equal(stored.to(dtype).double(), values)
        error = _RELATIVE_ERROR[dtype] + _COMPUTED
        if is_rounded and torch.allclose(values, wanted, rtol=error, atol=_SMALLEST[dtype]):
            return True
    return False
