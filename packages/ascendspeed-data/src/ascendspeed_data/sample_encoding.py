"""Encode samples: their texts, ids and losses become token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.errors import DataError
from ascendspeed_data.fast_tokenizer import Encoder, spot_check
from ascendspeed_data.sample import IGNORED_LABEL, Sample, Segment
from ascendspeed_data.tokenizer import Tokenizer


@dataclass(frozen=True)
class _TextSpan:
    """Adjacent texts of a sample, encoded as one text."""

    text: str
    edges: tuple[int, ...]
    """Character positions at which `trained` changes."""
    first_trained: bool

    def trained_characters(self) -> NDArray[np.bool_]:
        """Return which characters are trained, bool [characters]."""
        flags = np.empty(len(self.text), bool)
        for number, (start, end) in enumerate(pairwise([0, *self.edges, len(self.text)])):
            flags[start:end] = self.first_trained ^ bool(number % 2)
        return flags

    def trained_ids(self, offsets: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
        """Return which ids contain a trained character, bool [ids], by the character range of each id."""
        if not offsets:
            return np.empty(0, bool)
        before = np.concatenate([[0], np.cumsum(self.trained_characters())])
        bounds = np.minimum(
            np.array([(begin, max(end, begin + 1)) for begin, end in offsets]), len(self.text)
        )
        learned: NDArray[np.bool_] = before[bounds[:, 1]] > before[bounds[:, 0]]
        return learned


@dataclass(frozen=True)
class _EncodedSpan:
    """Ids of a text that the encoder of the run cannot encode."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


def encode_samples(
    samples: Sequence[Sample], tokenizer: Tokenizer, encoder: Encoder, suffix: Sequence[int], append_eod: bool
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return the ids and labels of each sample, both int32 [tokens]."""
    spans = [_spans(sample, tokenizer) for sample in samples]
    texts: list[str] = []
    for spans_of_sample in spans:
        for span in spans_of_sample:
            if isinstance(span, _TextSpan):
                texts += [span.text, *(span.text[:edge] for edge in span.edges)]
    spot_check(tokenizer, encoder, texts)
    encoded = iter(encoder.encode_without_special_tokens(texts).split() if texts else [])
    rows = []
    for sample, spans_of_sample in zip(samples, spans, strict=True):
        ids: list[NDArray[Any]] = []
        labels: list[NDArray[Any]] = []
        if sample.add_special_tokens:
            _append(ids, labels, np.array(tokenizer.prefix_ids, np.int32), False)
        for span in spans_of_sample:
            if isinstance(span, _TextSpan):
                whole = next(encoded)
                trained = _trained_tokens(span, whole, [next(encoded) for _ in span.edges], tokenizer)
                if sample.encode_separately:
                    _append(ids, labels, np.array(tokenizer.prefix_ids, np.int32), span.first_trained)
                _append(ids, labels, whole, trained)
                if sample.encode_separately:
                    _append(ids, labels, np.array(tokenizer.suffix_ids, np.int32), span.first_trained)
            elif isinstance(span, _EncodedSpan):
                _append(ids, labels, span.ids, span.trained)
            elif span.content is not None:
                _append(ids, labels, np.array([span.content], np.int32), span.trained)
                if span.label is not None:
                    labels[-1][:] = span.label
            elif append_eod:
                _append(ids, labels, np.array([tokenizer.eos_id], np.int32), span.trained)
        if sample.add_special_tokens and not append_eod:
            _append(ids, labels, np.array(suffix, np.int32), True)
        rows.append((joined(ids), joined(labels)))
    return rows


def _spans(sample: Sample, tokenizer: Tokenizer) -> list[_TextSpan | _EncodedSpan | Segment]:
    """Return the texts of a sample, split at special tokens if a chat template made them, and its ids."""
    found: list[_TextSpan | _EncodedSpan | Segment] = []
    for span in _merge_adjacent_texts(sample):
        if not sample.is_rendered or isinstance(span, Segment):
            found.append(span)
            continue
        parts = tokenizer.split_rendered(span.text)
        if parts is None:
            ids, offsets = tokenizer.encode_rendered(span.text)
            found.append(_EncodedSpan(np.array(ids, np.int32), span.trained_ids(offsets)))
            continue
        if len(parts) == 1 and parts[0].text == span.text and parts[0].token is None:
            found.append(span)
            continue
        characters = span.trained_characters()
        for part in parts:
            trained = characters[part.positions()]
            if part.token is None:
                edges = np.flatnonzero(np.diff(trained)) + 1
                found.append(_TextSpan(part.text, tuple(edges.tolist()), bool(trained[0])))
            else:
                found.append(Segment(part.token.id, bool(trained.any())))
    return found


def _merge_adjacent_texts(sample: Sample) -> list[_TextSpan | Segment]:
    found: list[_TextSpan | Segment] = []
    held: list[Segment] = []

    def release() -> None:
        text, edges = "", []
        for number, segment in enumerate(held):
            if number and segment.trained != held[number - 1].trained:
                edges.append(len(text))
            text += str(segment.content)
        if text:
            found.append(_TextSpan(text, tuple(edges), held[0].trained))
        held.clear()

    for segment in sample.segments:
        if isinstance(segment.content, str):
            if segment.content:
                held.append(segment)
            if sample.encode_separately:
                release()
        else:
            release()
            found.append(segment)
    release()
    return found


def _trained_tokens(
    span: _TextSpan, whole: NDArray[Any], begins: Sequence[NDArray[Any]], tokenizer: Tokenizer
) -> NDArray[np.bool_]:
    """Return which tokens contain a trained character, bool [tokens].

    If the text before an edge encodes to a prefix of the whole, the edge lies between two tokens. Otherwise a token
    spans the edge, and the character offsets of the tokens decide.
    """
    if all(len(begin) <= len(whole) and np.array_equal(whole[: len(begin)], begin) for begin in begins):
        bounds = [0, *map(len, begins), len(whole)]
        flags = np.empty(len(whole), bool)
        for number, (start, end) in enumerate(pairwise(bounds)):
            flags[start:end] = span.first_trained ^ bool(number % 2)
        return flags
    ids, offsets = tokenizer.encode_with_offsets(span.text)
    if not np.array_equal(ids, whole):
        raise DataError(
            f"the tokenizer encodes {span.text[:60]!r} differently with offsets; remove the record"
        )
    return span.trained_ids(offsets)


def _append(
    ids: list[NDArray[Any]], labels: list[NDArray[Any]], more: NDArray[Any], trained: bool | NDArray[np.bool_]
) -> None:
    ids.append(more.astype(np.int32))
    labels.append(np.where(trained, more, IGNORED_LABEL).astype(np.int32))


def joined(arrays: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    """Return arrays as one; none are an empty one."""
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)
