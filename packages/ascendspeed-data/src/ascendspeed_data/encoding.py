"""Encode the records of a shard into token ids, attention masks and labels."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data.column_names import renamed
from ascendspeed_data.errors import DataError
from ascendspeed_data.fast_tokenizer import Encoder, ExactEncoder, spot_check
from ascendspeed_data.fields import check_record, filled
from ascendspeed_data.handlers import IGNORED_LABEL, Sample, SampleHandler, TextHandler, kind_of
from ascendspeed_data.handlers.registry import handlers_for
from ascendspeed_data.indexed import optimal_token_format
from ascendspeed_data.literal_pieces import LiteralTokenizer, literal_samples
from ascendspeed_data.reading.records import check_columns, location_of, records_of_shard, text_of
from ascendspeed_data.reading.shards import Shard
from ascendspeed_data.sample import Record
from ascendspeed_data.sample_encoding import encode_samples, joined
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
    num_spelling_records: int = 0
    """Records whose texts spell special pieces, which were read as text."""
    num_other_prompts: int = 0
    """Records with an answer that a chat asks for with another prompt."""
    split_conversations: dict[str, int] = field(default_factory=dict)
    """Why conversations became several samples, with the number of such records."""

    def add(self, other: "Counts") -> None:
        """Add other counts."""
        for name, value in vars(other).items():
            if not isinstance(value, dict):
                setattr(self, name, getattr(self, name) + value)
        self.add_unused(other.unused_columns)
        self.add_split(other.split_conversations)

    def add_unused(self, counts: Mapping[str, int]) -> None:
        """Add numbers of records with columns and keys that nothing read."""
        for name, count in counts.items():
            self.unused_columns[name] = self.unused_columns.get(name, 0) + count

    def add_split(self, counts: Mapping[str, int]) -> None:
        """Add numbers of conversations that became several samples, by the reason."""
        for reason, count in counts.items():
            self.split_conversations[reason] = self.split_conversations.get(reason, 0) + count


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
        parse_special: read special pieces that records of samples spell as control; otherwise they are text.
        columns: names of columns in the input, by the names that the handler reads.
    """

    handler: TextHandler | SampleHandler
    json_keys: Sequence[str]
    append_eod: bool
    tokenizer: Tokenizer
    encoder: Encoder
    parse_special: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    _suffix: list[int] = field(init=False)
    _literal: LiteralTokenizer | None = field(init=False)

    def __post_init__(self) -> None:
        self._suffix = document_suffix(self.tokenizer, self.append_eod)
        reads_control = self.parse_special or getattr(self.handler, "reads_special_pieces", False)
        self._literal = None if reads_control else LiteralTokenizer.for_tokenizer(self.tokenizer)

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
        for number, read in records_of_shard(shard):
            try:
                plain = renamed(read, self.columns)
                record = TrackedObject(plain)
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
        literal_rows: dict[int, Sample] = {}
        sequences: list[int] = []
        counts = Counts()
        for number, read in records_of_shard(shard):
            try:
                plain = renamed(read, self.columns)
                check_columns(plain, handler.columns, f"{handler.name} needs it")
                record = TrackedObject(plain)
                made = handler.samples(record, self.tokenizer)
                refused = getattr(handler, "refused_columns", ())
                unused = dict.fromkeys(check_record(unread_of(record), handler.name, refused), 1)
                for sample in made:
                    unused |= dict.fromkeys(sample.unused, 1)
                counts.add_unused(unused)
                counts.add_split(dict.fromkeys((sample.reason for sample in made if sample.reason), 1))
                counts.num_other_prompts += any(sample.has_other_prompt for sample in made)
                if is_pairs and len(made) not in (0, 2):
                    raise DataError(f"{handler.name} made {len(made)} samples of a record; a pair has two")
                literal = self._with_literals(handler, plain, made)
            except DataError as error:
                raise DataError(f"{location_of(shard, number)}: {error}") from None
            made = made if literal is None else literal
            for sample in made:
                for segment in sample.segments:
                    if isinstance(segment.content, str):
                        text = segment.content
                        if literal is not None and self._literal is not None:
                            text = self._literal.written_out(text)
                        counts.num_text_bytes += _size_of(text, shard, number)
            counts.num_empty_documents += not made
            if literal is not None:
                counts.num_spelling_records += 1
                literal_rows |= dict(enumerate(literal, len(samples)))
            if made:
                sequences.append(len(made))
                samples += made
        rows = self._rows(samples, literal_rows)
        lengths = np.fromiter((len(ids) for ids, _ in rows), np.int32, len(rows))
        ids = joined([ids for ids, _ in rows])
        labels = joined([labels for _, labels in rows])
        counts.num_documents, counts.num_sequences = len(sequences), len(rows)
        counts.num_tokens, counts.num_trained_tokens = len(ids), int((labels != IGNORED_LABEL).sum())
        arrays = {INPUT_IDS: ids, ATTENTION_MASK: np.ones(len(ids), np.int32), LABELS: labels}
        frequencies = count_ids(ids, self.tokenizer.vocab_size)
        return EncodedOutput(arrays, lengths, np.array(sequences, np.int32), counts, frequencies)

    def _with_literals(
        self, handler: SampleHandler, plain: Record, made: list[Sample]
    ) -> list[Sample] | None:
        """Return the samples of a record whose special pieces are text; `None` where it spells none."""
        if self._literal is None:
            return None

        def make(record: Record) -> list[Sample]:
            return handler.samples(TrackedObject(record), self.tokenizer)

        return literal_samples(make, plain, made, self._literal)

    def _rows(
        self, samples: Sequence[Sample], literal: Mapping[int, Sample]
    ) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Return ids and labels of samples; those of `literal`, by their number, hold stand-ins."""
        plain = [sample for number, sample in enumerate(samples) if number not in literal]
        rows = encode_samples(plain, self.tokenizer, self.encoder, self._suffix, self.append_eod)
        if self._literal is None or not literal:
            return rows
        own: Any = self._literal
        found = encode_samples(list(literal.values()), own, ExactEncoder(own), self._suffix, self.append_eod)
        several = {True: iter(found), False: iter(rows)}
        return [next(several[number in literal]) for number in range(len(samples))]


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
