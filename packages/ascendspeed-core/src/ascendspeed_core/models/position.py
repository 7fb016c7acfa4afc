"""Positions in attention: rotary embedding or ALiBi, and which keys a query sees.

Shapes: B batch, S queries, T keys (the last S of them belong to the queries), N query heads of this rank, D head size,
R the part of a head that rotary embedding turns (all of it in most models).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ascendspeed_core.config.model import ModelConfig, RotaryScaling
from ascendspeed_core.kernels.mask_rule import MaskRule, attention_mask
from ascendspeed_core.models.cached_pass import CachedPass
from ascendspeed_core.models.dropout import DropoutMasks


@dataclass(frozen=True)
class RotaryKind:
    """A rotary embedding.

    Attributes:
        dim: R, the first numbers of a head, which are turned; even.
        base: of the frequencies.
        scaling: change of the frequencies for long texts.
        is_interleaved: pairs are neighbours, 2i and 2i + 1 (GPT-J), instead of i and i + R/2 (GPT-NeoX).
    """

    dim: int
    base: float
    scaling: RotaryScaling | None = None
    is_interleaved: bool = False


@dataclass(frozen=True)
class AttentionKind:
    """What the attention of a layer needs of masks and positions; layers of one kind share `AttentionInputs`.

    Attributes:
        window: keys that a query sees, its own included; `None` for all.
        rotary: rotary embedding; `None` without.
    """

    window: int | None = None
    rotary: RotaryKind | None = None


@dataclass(frozen=True)
class AttentionInputs:
    """What attention needs besides hidden states; the same for all layers of a kind.

    Attributes:
        rotary: cosine and sine of the queries' positions, [B, S, 1, R] each; `None` without rotary embedding.
        mask: of whole sequences; `None` when a query sees all keys up to its own position.
        chunk_masks: what `attention_mask` returns for each chunk of a `CachedPass`, over the keys that the window
            leaves.
        dropout_masks: what is dropped of the layer that gets these inputs; `None` when nothing is.
    """

    rotary: tuple[torch.Tensor, torch.Tensor] | None
    mask: MaskRule | None
    chunk_masks: tuple[torch.Tensor | None, ...] = ()
    dropout_masks: DropoutMasks | None = None

    def in_layer(self, number: int) -> "AttentionInputs":
        """Return them for one layer."""
        if self.dropout_masks is None:
            return self
        return replace(self, dropout_masks=self.dropout_masks.in_layer(number))


class Positions:
    """Makes `AttentionInputs`; not a module, so it never enters a checkpoint.

    Args:
        config: the model.
        kinds: of the layers on this rank, each once.

    Attributes:
        kinds: as given.
        heads: query heads that attention has on this rank, all of them unless the model is cut.
        sequence_parts: ranks that each have a part of the sequence outside attention, one unless it is cut.
        sequence_part: which of the parts this rank has.
    """

    def __init__(self, config: ModelConfig, kinds: Sequence[AttentionKind]) -> None:
        self.kinds = tuple(kinds)
        rotary = dict.fromkeys(kind.rotary for kind in kinds)
        self._embeddings = {kind: RotaryEmbedding(kind) for kind in rotary if kind is not None}
        self._slopes = alibi_slopes(config.num_attention_heads) if config.position == "alibi" else None
        self.heads = range(config.num_attention_heads)
        self.sequence_parts, self.sequence_part = 1, 0

    def default_position_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the positions of tokens, [B, S] -> [B, S], from 0 on; of this rank's part where they are cut."""
        batch, length = tokens.shape
        start = self.sequence_part * length
        return torch.arange(start, start + length, device=tokens.device).expand(batch, length)

    def attention_inputs(
        self,
        positions: torch.Tensor,
        dtype: torch.dtype,
        segments: torch.Tensor | None = None,
        dropout_masks: DropoutMasks | None = None,
    ) -> list[AttentionInputs]:
        """Return what attention needs, for each kind of layer.

        Args:
            positions: of each token in its text, [B, S]; rotary embedding turns by it. Masks and ALiBi go by the
                order of tokens, and are for whole sequences where these are cut.
            dtype: of the hidden states.
            segments: number of the text that each token belongs to, [B, S], when a row holds several; attention
                stays inside a text.
            dropout_masks: what dropout drops.
        """
        length = positions.shape[1] * self.sequence_parts
        masks = self.mask_rules(length, positions.device, dtype, segments)
        angles = self._cos_sin(positions, dtype)
        return [
            AttentionInputs(angles[kind.rotary], masks[kind.window], dropout_masks=dropout_masks)
            for kind in self.kinds
        ]

    def mask_rules(
        self, length: int, device: torch.device, dtype: torch.dtype, segments: torch.Tensor | None
    ) -> dict[int | None, MaskRule | None]:
        """Return which keys the queries of whole sequences see, for each window that layers have.

        Args:
            length: S.
            device: of the hidden states.
            dtype: of these.
            segments: see `attention_inputs`.
        """
        whole = MaskRule(length, device, None, self._local_slopes(dtype, device), dtype, segments)
        return {window: whole.within(window) for window in self._windows()}

    def cached_attention_inputs(self, cached: CachedPass, dtype: torch.dtype) -> list[AttentionInputs]:
        """Return what attention needs for chunks of sequences, for each kind of layer."""
        is_masked = cached.lengths is None
        masks = {
            window: self._chunk_masks(cached, window, dtype) if is_masked else ()
            for window in self._windows()
        }
        angles = self._cos_sin(cached.positions, dtype)
        return [AttentionInputs(angles[kind.rotary], None, masks[kind.window]) for kind in self.kinds]

    def _windows(self) -> dict[int | None, None]:
        return dict.fromkeys(kind.window for kind in self.kinds)

    def _cos_sin(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> dict[RotaryKind | None, tuple[torch.Tensor, torch.Tensor] | None]:
        """Return cosine and sine for each rotary embedding."""
        made: dict[RotaryKind | None, tuple[torch.Tensor, torch.Tensor] | None] = {None: None}
        for kind, embedding in self._embeddings.items():
            made[kind] = embedding.cos_sin(positions, dtype)
        return made

    def _chunk_masks(
        self, cached: CachedPass, window: int | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the mask of each chunk."""
        device = cached.positions.device
        slopes = self._local_slopes(dtype, device)
        sizes = [(chunk.count, chunk.end - chunk.first_visible(window)) for chunk in cached.attended]
        if slopes is None:
            return tuple(attention_mask(*size, window, None, dtype, device) for size in sizes)
        # Of chunks with as many queries, each one's mask is the end of the one over most keys.
        longest = dict(sorted(sizes))
        whole = {
            queries: attention_mask(queries, keys, window, slopes, dtype, device)
            for queries, keys in longest.items()
        }
        return tuple(
            None if (mask := whole[queries]) is None else mask[..., -keys:] for queries, keys in sizes
        )

    def _local_slopes(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
        """Return ALiBi's slopes of this rank's heads, [N]."""
        if self._slopes is None:
            return None
        wide = dtype if dtype == torch.float64 else torch.float32
        return torch.tensor(self._slopes[self.heads.start : self.heads.stop], dtype=wide, device=device)


def alibi_slopes(num_heads: int) -> list[float]:
    """Return the slope of each head (Press et al., 2022, section 3; other numbers than powers of 2 as in its code)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-4 * (2 * head + 1) / power) for head in range(num_heads - power)]


class RotaryEmbedding:
    """Cosines and sines (Su et al., 2021, RoFormer, section 3.4.2), half-split layout of GPT-NeoX and LLaMA.

    Computed in fp32, as the published weights were trained.
    """

    def __init__(self, kind: RotaryKind) -> None:
        self._kind = kind
        self._frequencies: torch.Tensor | None = None
        self._magnitude = magnitude_of(kind.scaling)

    def cos_sin(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosine and sine, each [B, S, 1, R], for `positions` [B, S]."""
        if self._frequencies is None or self._frequencies.device != positions.device:
            self._frequencies = rotary_frequencies(self._kind).to(positions.device)
        angles = positions.float().unsqueeze(-1) * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._magnitude != 1:
            cos, sin = cos * self._magnitude, sin * self._magnitude
        cos, sin = cos.to(dtype), sin.to(dtype)
        # Both numbers of a pair have the same angle.
        return torch.cat([cos, cos], dim=-1).unsqueeze(-2), torch.cat([sin, sin], dim=-1).unsqueeze(-2)


def rotary_frequencies(kind: RotaryKind) -> torch.Tensor:
    """Return the angle per position of each pair of dimensions, fp32, [R/2]."""
    pairs = torch.arange(0, kind.dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / (kind.base ** (pairs / kind.dim))
    scaling = kind.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    assert scaling.original_max_position_embeddings is not None
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling, scaling.original_max_position_embeddings)
    return _yarn(frequencies, kind, scaling, scaling.original_max_position_embeddings)


def _llama3(frequencies: torch.Tensor, scaling: RotaryScaling, length: int) -> torch.Tensor:
    """Divide frequencies that turn rarely within the original length, keep fast ones, blend between (Llama 3.1)."""
    turns = length * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * frequencies / scaling.factor + keep * frequencies


def _yarn(frequencies: torch.Tensor, kind: RotaryKind, scaling: RotaryScaling, length: int) -> torch.Tensor:
    """Blend by a ramp over dimensions (Peng et al., 2023, YaRN, section 3.2)."""

    def dimension_of(turns: float) -> float:
        return kind.dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(kind.base))

    first, last = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, kind.dim - 1)
    pairs = torch.arange(kind.dim // 2, dtype=torch.float32)
    divide = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return divide * frequencies / scaling.factor + (1 - divide) * frequencies


def magnitude_of(scaling: RotaryScaling | None) -> float:
    """Return the factor of cosine and sine: YaRN sharpens attention with it (section 3.4), others do not."""
    if scaling is None or scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return yarn_mscale(scaling.factor, scaling.mscale) / yarn_mscale(
            scaling.factor, scaling.mscale_all_dim
        )
    return yarn_mscale(scaling.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return `0.1 mscale ln(factor) + 1`, or 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
