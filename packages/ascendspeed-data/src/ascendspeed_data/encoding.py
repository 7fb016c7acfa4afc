"""Encode records and samples into token ids, attention masks and labels."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.errors import DataError
from ascendspeed_data.fast_tokenizer import Encoder, spot_check
from ascendspeed_data.fields import check_record, filled
from ascendspeed_data.handlers import IGNORED_LABEL, Sample, SampleHandler, Segment, TextHandler, kind_of
from ascendspeed_data.handlers.registry import handlers_for
from ascendspeed_data.indexed import optimal_token_format
from ascendspeed_data.reading.records import Record, check_columns, location_of, records_of_shard, text_of
from ascendspeed_data.reading.shards import Shard
from ascendspeed_data.token_batch import TokenBatch
from ascendspeed_data.token_frequencies import count_ids
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_data.tracking import TrackedObject, unread_of

INPUT_IDS, ATTENTION_MASK, LABELS = "input_ids", "attention_mask", "labels"
SAMPLE_ARRAYS = (INPUT_IDS, ATTENTION_MASK, LABELS)
"""The arrays of a dataset of samples, each in its own pair of files."""


@dataclass
class Counts:
    """Counts of one output dataset."""

    num_documents: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_empty_documents: int = 0
    num_text_bytes: int = 0
    unused_columns: dict[str, int] = field(default_factory=dict)
    """Columns and keys that nothing read, with the number of records in which they are filled."""

    def add(self, other: "Counts") -> None:
        """Add other counts."""
        for name, value in vars(other).items():
            if name != "unused_columns":
                setattr(self, name, getattr(self, name) + value)
        self.add_unused(other.unused_columns)

    def add_unused(self, counts: Mapping[str, int]) -> None:
        """Add numbers of records with columns and keys that nothing read."""
        for name, count in counts.items():
            self.unused_columns[name] = self.unused_columns.get(name, 0) + count


@dataclass(frozen=True)
class EncodedOutput:
    """Encoded documents of one output dataset.

    Attributes:
        arrays: token ids, attention mask and labels, by array.
        lengths: tokens of each sequence.
        sequences: sequences of each document; `None` if each document is one sequence.
        counts: of these documents.
        frequencies: how often each id occurs, int64 [vocab_size].
    """

    arrays: dict[str, NDArray[Any]]
    lengths: NDArray[np.int32]
    sequences: NDArray[np.int32] | None
    counts: Counts
    frequencies: NDArray[np.int64]


@dataclass
class ShardEncoder:
    """Encode the records of shards.

    Attributes:
        handler: turns records into documents or samples.
        json_keys: columns of `--json-key`, for a handler without its own columns; one output dataset each.
        append_eod: end each document with the end-of-sequence id.
        tokenizer: defines the ids.
        encoder: computes the ids, possibly faster than the tokenizer.
    """

    handler: TextHandler | SampleHandler
    json_keys: Sequence[str]
    append_eod: bool
    tokenizer: Tokenizer
    encoder: Encoder
    _suffix: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._suffix = document_suffix(self.tokenizer, self.append_eod)

    def encode(self, shard: Shard) -> dict[str, EncodedOutput]:
        """Return the encoded documents of a shard, by column; samples have the key ``""``."""
        if isinstance(self.handler, SampleHandler):
            return {"": self._encode_samples(self.handler, shard)}
        return self._encode_texts(self.handler, shard)

    def texts(
        self, shard: Shard, unused: Counter[str] | None = None
    ) -> Iterator[tuple[int, list[list[str]]]]:
        """Yield the number of each record and its texts by column; count columns that nothing read in `unused`."""
        assert isinstance(self.handler, TextHandler)
        for number, plain in records_of_shard(shard):
            record = TrackedObject(plain)
            try:
                if self.handler.columns:
                    check_columns(plain, self.handler.columns, f"{self.handler.name} needs it")
                else:
                    for key in self.json_keys:
                        _check_text(plain, key)
                made = [self.handler.texts(record, key) for key in self.json_keys]
                if unused is not None:
                    unused.update(name for name, value in unread_of(record).items() if filled(value))
                yield number, made
            except DataError as error:
                raise DataError(f"{location_of(shard, number)}: {error}") from None

    def _encode_texts(self, handler: TextHandler, shard: Shard) -> dict[str, EncodedOutput]:
        texts: dict[str, list[str]] = {key: [] for key in self.json_keys}
        num_empty = dict.fromkeys(self.json_keys, 0)
        num_bytes = dict.fromkeys(self.json_keys, 0)
        unused: Counter[str] = Counter()
        num_records = 0
        for number, of_outputs in self.texts(shard, unused):
            num_records += 1
            for key, of_record in zip(self.json_keys, of_outputs, strict=True):
                for text in of_record:
                    if text:
                        num_bytes[key] += _size_of(text, shard, number)
                        texts[key].append(text)
                    else:
                        num_empty[key] += 1
        unused.update(dict.fromkeys(shard.unread_columns, num_records))
        encoded = {}
        for key, kept in texts.items():
            batch = self.encoder.encode_without_special_tokens(kept)
            spot_check(self.tokenizer, self.encoder, kept)
            num_documents = len(kept)
            kept.clear()
            token_format = optimal_token_format(self.tokenizer.vocab_size)
            batch = TokenBatch(batch.ids.astype(token_format, copy=False), batch.lengths)
            whole = add_prefix_and_suffix(batch, self.tokenizer.prefix_ids, self._suffix)
            ids = whole.ids
            frequencies = count_ids(ids, self.tokenizer.vocab_size)
            counts = Counts(
                num_documents, num_documents, len(ids), len(ids), num_empty[key], num_bytes[key], dict(unused)
            )
            encoded[key] = EncodedOutput(
                {key: ids}, whole.lengths.astype(np.int32), None, counts, frequencies
            )
        return encoded

    def _encode_samples(self, handler: SampleHandler, shard: Shard) -> EncodedOutput:
        is_pairs = kind_of(handler) == "pairs"
        samples: list[Sample] = []
        sequences: list[int] = []
        counts = Counts()
        for number, plain in records_of_shard(shard):
            try:
                check_columns(plain, handler.columns, f"{handler.name} needs it")
                record = TrackedObject(plain)
                made = handler.samples(record, self.tokenizer)
                refused = getattr(handler, "refused_columns", ())
                unused = dict.fromkeys(check_record(unread_of(record), handler.name, refused), 1)
                for sample in made:
                    unused |= dict.fromkeys(sample.unused, 1)
                counts.add_unused(unused)
                if is_pairs and len(made) not in (0, 2):
                    raise DataError(f"{handler.name} made {len(made)} samples of a record; a pair has two")
            except DataError as error:
                raise DataError(f"{location_of(shard, number)}: {error}") from None
            for sample in made:
                for segment in sample.segments:
                    if isinstance(segment.content, str):
                        counts.num_text_bytes += _size_of(segment.content, shard, number)
            counts.num_empty_documents += not made
            if made:
                sequences.append(len(made))
                samples += made
        rows = encode_samples(samples, self.tokenizer, self.encoder, self._suffix, self.append_eod)
        lengths = np.fromiter((len(ids) for ids, _ in rows), np.int32, len(rows))
        ids = _joined([ids for ids, _ in rows])
        labels = _joined([labels for _, labels in rows])
        counts.num_documents, counts.num_sequences = len(sequences), len(rows)
        counts.num_tokens, counts.num_trained_tokens = len(ids), int((labels != IGNORED_LABEL).sum())
        arrays = {INPUT_IDS: ids, ATTENTION_MASK: np.ones(len(ids), np.int32), LABELS: labels}
        frequencies = count_ids(ids, self.tokenizer.vocab_size)
        return EncodedOutput(arrays, lengths, np.array(sequences, np.int32), counts, frequencies)


def document_suffix(tokenizer: Tokenizer, append_eod: bool) -> list[int]:
    """Return the ids after a document: the tokenizer's suffix, then EOS if `append_eod` and the suffix has none."""
    suffix = list(tokenizer.suffix_ids)
    if append_eod and suffix[-1:] != [tokenizer.eos_id]:
        assert tokenizer.eos_id is not None
        suffix.append(tokenizer.eos_id)
    return suffix


def add_prefix_and_suffix(batch: TokenBatch, prefix: Sequence[int], suffix: Sequence[int]) -> TokenBatch:
    """Add ids before and after each text."""
    if not prefix and not suffix:
        return batch
    lengths = batch.lengths + len(prefix) + len(suffix)
    ends = np.cumsum(lengths)
    ids = np.empty(int(lengths.sum()), batch.ids.dtype)
    is_content = np.ones(len(ids), bool)
    for positions, value in (
        *((ends - lengths + offset, token) for offset, token in enumerate(prefix)),
        *((ends - len(suffix) + offset, token) for offset, token in enumerate(suffix)),
    ):
        ids[positions] = value
        is_content[positions] = False
    ids[is_content] = batch.ids
    return TokenBatch(ids, lengths)


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
        rows.append((_joined(ids), _joined(labels)))
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


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)


def _size_of(text: str, shard: Shard, number: int) -> int:
    """Return the size of a text in UTF-8 bytes; reject a text that UTF-8 cannot encode."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(
            f"{location_of(shard, number)}: half a surrogate pair at character {error.start} is not valid text; "
            "repair the record"
        ) from None


def _check_text(record: Record, key: str) -> None:
    """Raise `DataError` unless a record has a text; the message names handlers that read such records."""
    try:
        text_of(record, key)
    except DataError as error:
        fitting = handlers_for(record) if key not in record else []
        hint = f"; --handler-name {fitting[0]} reads such records (all: asd-data handlers)" if fitting else ""
        raise DataError(f"{error}{hint}") from None
