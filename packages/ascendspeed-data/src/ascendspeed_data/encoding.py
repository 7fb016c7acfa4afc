"""What a worker does: the records of a shard become ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.errors import DataError
from ascendspeed_data.fast_tokenizer import Encoder, spot_check
from ascendspeed_data.handlers import IGNORED_LABEL, Part, Sample, SampleHandler, TextHandler, kind_of
from ascendspeed_data.indexed import smallest_format
from ascendspeed_data.reading.records import check_columns, place_of, records_of, text_of
from ascendspeed_data.reading.shards import Shard
from ascendspeed_data.tokenizer import TokenBatch, Tokenizer

IDS_PER_PIECE = 1 << 20
INPUT_IDS, ATTENTION_MASK, LABELS = "input_ids", "attention_mask", "labels"


@dataclass
class Counts:
    """What was counted of one output; every field can be added up."""

    num_documents: int = 0
    num_sequences: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    num_empty_documents: int = 0
    num_text_bytes: int = 0

    def add(self, other: "Counts") -> None:
        """Add the numbers of another piece."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class EncodedOutput:
    """Documents of one output.

    Attributes:
        arrays: ids by the name of the file pair that they go to.
        lengths: ids of each sequence.
        sequences: sequences of each document, `None` if it is one everywhere.
        counts: of what is here.
        frequencies: how often each id occurs, int64.
    """

    arrays: dict[str, NDArray[Any]]
    lengths: NDArray[np.int32]
    sequences: NDArray[np.int32] | None
    counts: Counts
    frequencies: NDArray[np.int64]


@dataclass
class ShardEncoder:
    """Encode shards.

    Attributes:
        handler: how records become documents.
        json_keys: columns of a handler that takes those of `--json-key`; one output each.
        append_eod: end documents with the end-of-sequence id.
        tokenizer: whose ids are wanted.
        encoder: what encodes.
    """

    handler: TextHandler | SampleHandler
    json_keys: Sequence[str]
    append_eod: bool
    tokenizer: Tokenizer
    encoder: Encoder
    _suffix: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._suffix = suffix_of(self.tokenizer, self.append_eod)

    def encode(self, shard: Shard) -> dict[str, EncodedOutput]:
        """Return the documents of a shard by output; a handler of samples has one output, named ``""``."""
        if isinstance(self.handler, SampleHandler):
            return {"": self._encode_samples(self.handler, shard)}
        return self._encode_texts(self.handler, shard)

    def texts(self, shard: Shard) -> Iterator[tuple[int, list[list[str]]]]:
        """Yield, for each record, its number and its texts by output."""
        assert isinstance(self.handler, TextHandler)
        for number, record in records_of(shard):
            try:
                if self.handler.columns:
                    check_columns(record, self.handler.columns, f"needed by {self.handler.name}")
                else:
                    for key in self.json_keys:
                        text_of(record, key)
                yield number, [self.handler.texts(record, key) for key in self.json_keys]
            except DataError as error:
                raise DataError(f"{place_of(shard, number)}: {error}") from None

    def _encode_texts(self, handler: TextHandler, shard: Shard) -> dict[str, EncodedOutput]:
        texts: dict[str, list[str]] = {key: [] for key in self.json_keys}
        num_empty = dict.fromkeys(self.json_keys, 0)
        num_bytes = dict.fromkeys(self.json_keys, 0)
        for number, of_outputs in self.texts(shard):
            for key, of_record in zip(self.json_keys, of_outputs, strict=True):
                for text in of_record:
                    if text:
                        num_bytes[key] += _size_of(text, shard, number)
                        texts[key].append(text)
                    else:
                        num_empty[key] += 1
        encoded = {}
        for key, kept in texts.items():
            batch = self.encoder.encode_contents(kept)
            spot_check(self.tokenizer, self.encoder, kept)
            num_documents = len(kept)
            kept.clear()
            token_format = smallest_format(self.tokenizer.vocab_size)
            batch = TokenBatch(batch.ids.astype(token_format, copy=False), batch.lengths)
            whole = surround(batch, self.tokenizer.prefix_ids, self._suffix)
            ids = whole.ids
            frequencies = frequencies_of(ids, self.tokenizer.vocab_size)
            counts = Counts(num_documents, num_documents, len(ids), len(ids), num_empty[key], num_bytes[key])
            encoded[key] = EncodedOutput(
                {key: ids}, whole.lengths.astype(np.int32), None, counts, frequencies
            )
        return encoded

    def _encode_samples(self, handler: SampleHandler, shard: Shard) -> EncodedOutput:
        is_pairs = kind_of(handler) == "pairs"
        samples: list[Sample] = []
        sequences: list[int] = []
        counts = Counts()
        for number, record in records_of(shard):
            try:
                check_columns(record, handler.columns, f"needed by {handler.name}")
                made = handler.samples(record, self.tokenizer)
                if is_pairs and len(made) not in (0, 2):
                    raise DataError(f"{handler.name} made {len(made)} samples; a pair has two")
            except DataError as error:
                raise DataError(f"{place_of(shard, number)}: {error}") from None
            for sample in made:
                for part in sample.parts:
                    if isinstance(part.content, str):
                        counts.num_text_bytes += _size_of(part.content, shard, number)
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
        frequencies = frequencies_of(ids, self.tokenizer.vocab_size)
        return EncodedOutput(arrays, lengths, np.array(sequences, np.int32), counts, frequencies)


def suffix_of(tokenizer: Tokenizer, append_eod: bool) -> list[int]:
    """Return the ids behind a document: the tokenizer's own, and the end of a document unless these end with it."""
    suffix = list(tokenizer.suffix_ids)
    if append_eod and suffix[-1:] != [tokenizer.eos_id]:
        assert tokenizer.eos_id is not None
        suffix.append(tokenizer.eos_id)
    return suffix


def surround(batch: TokenBatch, prefix: Sequence[int], suffix: Sequence[int]) -> TokenBatch:
    """Put ids before and behind every text."""
    if not prefix and not suffix:
        return batch
    lengths = batch.lengths + len(prefix) + len(suffix)
    ends = np.cumsum(lengths)
    ids = np.empty(int(lengths.sum()), batch.ids.dtype)
    is_content = np.ones(len(ids), bool)
    for places, value in (
        *((ends - lengths + offset, token) for offset, token in enumerate(prefix)),
        *((ends - len(suffix) + offset, token) for offset, token in enumerate(suffix)),
    ):
        ids[places] = value
        is_content[places] = False
    ids[is_content] = batch.ids
    return TokenBatch(ids, lengths)


def frequencies_of(ids: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    """Count how often each id occurs; piece by piece, as numpy widens ids to eight bytes."""
    counted = np.zeros(vocab_size, np.int64)
    for start in range(0, len(ids), IDS_PER_PIECE):
        counted += np.bincount(ids[start : start + IDS_PER_PIECE], minlength=vocab_size)
    return counted


@dataclass(frozen=True)
class _Run:
    """Texts of a sample that follow each other: tokenized as one."""

    text: str
    edges: tuple[int, ...]
    """Characters at which `trained` changes."""
    first_trained: bool


def encode_samples(
    samples: Sequence[Sample], tokenizer: Tokenizer, encoder: Encoder, suffix: Sequence[int], append_eod: bool
) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Return ids and labels of each sample."""
    runs = [_runs(sample) for sample in samples]
    texts: list[str] = []
    for pieces in runs:
        for run in pieces:
            if isinstance(run, _Run):
                texts += [run.text, *(run.text[:edge] for edge in run.edges)]
    spot_check(tokenizer, encoder, texts)
    encoded = iter(encoder.encode_contents(texts).split() if texts else [])
    rows = []
    for sample, pieces in zip(samples, runs, strict=True):
        ids: list[NDArray[Any]] = []
        labels: list[NDArray[Any]] = []
        if sample.surrounded:
            _append(ids, labels, np.array(tokenizer.prefix_ids, np.int32), False)
        for run in pieces:
            if isinstance(run, _Run):
                whole = next(encoded)
                trained = _trained_tokens(run, whole, [next(encoded) for _ in run.edges], tokenizer)
                if sample.each_text_alone:
                    _append(ids, labels, np.array(tokenizer.prefix_ids, np.int32), run.first_trained)
                _append(ids, labels, whole, trained)
                if sample.each_text_alone:
                    _append(ids, labels, np.array(tokenizer.suffix_ids, np.int32), run.first_trained)
            elif run.content is not None:
                _append(ids, labels, np.array([run.content], np.int32), run.trained)
                if run.label is not None:
                    labels[-1][:] = run.label
            elif append_eod:
                _append(ids, labels, np.array([tokenizer.eos_id], np.int32), run.trained)
        if sample.surrounded and not append_eod:
            _append(ids, labels, np.array(suffix, np.int32), True)
        rows.append((_joined(ids), _joined(labels)))
    return rows


def _runs(sample: Sample) -> list[_Run | Part]:
    found: list[_Run | Part] = []
    held: list[Part] = []

    def release() -> None:
        text, edges = "", []
        for number, part in enumerate(held):
            if number and part.trained != held[number - 1].trained:
                edges.append(len(text))
            text += str(part.content)
        if text:
            found.append(_Run(text, tuple(edges), held[0].trained))
        held.clear()

    for part in sample.parts:
        if isinstance(part.content, str):
            if part.content:
                held.append(part)
            if sample.each_text_alone:
                release()
        else:
            release()
            found.append(part)
    release()
    return found


def _trained_tokens(
    run: _Run, whole: NDArray[Any], begins: Sequence[NDArray[Any]], tokenizer: Tokenizer
) -> NDArray[np.bool_]:
    """Return which tokens hold a trained character.

    Where the text up to an edge, tokenized by itself, gives the first tokens of the whole, the edge lies between two
    tokens. Otherwise a token lies across it, and the characters of each token tell.
    """
    if all(len(begin) <= len(whole) and np.array_equal(whole[: len(begin)], begin) for begin in begins):
        bounds = [0, *map(len, begins), len(whole)]
        flags = np.empty(len(whole), bool)
        for number, (start, end) in enumerate(pairwise(bounds)):
            flags[start:end] = run.first_trained ^ bool(number % 2)
        return flags
    characters = np.empty(len(run.text), np.int64)
    edges = [0, *run.edges, len(run.text)]
    for number, (start, end) in enumerate(pairwise(edges)):
        characters[start:end] = run.first_trained ^ bool(number % 2)
    before = np.concatenate([[0], np.cumsum(characters)])
    ids, places = tokenizer.encode_with_places(run.text)
    if not np.array_equal(ids, whole):
        raise DataError(f"the tokenizer gives two results for {run.text[:60]!r}")
    bounds_of = np.minimum(np.array([(begin, max(end, begin + 1)) for begin, end in places]), len(run.text))
    learned: NDArray[np.bool_] = before[bounds_of[:, 1]] > before[bounds_of[:, 0]]
    return learned


def _append(
    ids: list[NDArray[Any]], labels: list[NDArray[Any]], more: NDArray[Any], trained: bool | NDArray[np.bool_]
) -> None:
    ids.append(more.astype(np.int32))
    labels.append(np.where(trained, more, IGNORED_LABEL).astype(np.int32))


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[np.int32]:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)


def _size_of(text: str, shard: Shard, number: int) -> int:
    """Return the bytes of a text; a text that has none is refused."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place_of(shard, number)}: holds half a surrogate pair at character {error.start}, which is no text; "
            "repair the record"
        ) from None
