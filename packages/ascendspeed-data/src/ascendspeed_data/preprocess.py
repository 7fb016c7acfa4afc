"""Tokenize files into indexed datasets with a manifest.

Documents keep the order of the input. Work is handed out in batches of records and collected in order, so the
bytes are the same for any number of workers.
"""

import hashlib
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data import __version__
from ascendspeed_data.command_line import Progress
from ascendspeed_data.errors import AscendSpeedError, ConfigError, DataError
from ascendspeed_data.files import write_durably
from ascendspeed_data.handlers import find_handler
from ascendspeed_data.indexed import IndexedDatasetWriter, smallest_format
from ascendspeed_data.lock import output_lock
from ascendspeed_data.manifest import DatasetManifest, InputRecord, TokenizerRecord, manifest_path
from ascendspeed_data.readers import find_inputs, read_records, text_of
from ascendspeed_data.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer

RECORDS_PER_BATCH = 64
BATCHES_IN_FLIGHT_PER_WORKER = 4


@dataclass(frozen=True)
class PreprocessJob:
    """What to tokenize, and how.

    Attributes:
        inputs: files, folders, globs.
        output_prefix: each column gives `<prefix>_<column>_document.bin` and `.idx`.
        tokenizer: folder or file.
        tokenizer_type: `PretrainedFromHF`.
        json_keys: columns.
        handler_name: how a record becomes documents.
        append_eod: end each document with the tokenizer's end-of-sequence id.
        workers: processes that tokenize.
        overwrite: replace outputs that exist.
    """

    inputs: tuple[str, ...]
    output_prefix: Path
    tokenizer: Path
    tokenizer_type: str = "PretrainedFromHF"
    json_keys: tuple[str, ...] = ("text",)
    handler_name: str = "GeneralPretrainHandler"
    append_eod: bool = True
    workers: int = 1
    overwrite: bool = False

    def prefix_of(self, key: str) -> Path:
        """Return the dataset prefix of a column."""
        return self.output_prefix.with_name(f"{self.output_prefix.name}_{key}_document")


@dataclass(frozen=True)
class _Batch:
    """Documents of one column, tokenized."""

    lengths: list[int]
    tokens: NDArray[Any]
    num_empty: int
    num_text_bytes: int


def preprocess(job: PreprocessJob, seconds_between_lines: float = 10.0) -> dict[str, DatasetManifest]:
    """Tokenize, write, and return the manifest of each column.

    Raises:
        ConfigError: an unknown handler, tokenizer type or ending.
        AscendSpeedError: an input that cannot be read, an output that exists or is being written.
    """
    find_handler(job.handler_name)
    tokenizer = load_tokenizer(job.tokenizer, job.tokenizer_type)
    if job.append_eod and tokenizer.eos_id is None:
        raise DataError(
            f"tokenizer {job.tokenizer} names no end-of-sequence id to end documents with; give --no-append-eod"
        )
    files = find_inputs(job.inputs)
    if not job.overwrite:
        for key in job.json_keys:
            _refuse_existing(job.prefix_of(key))
    lock = job.output_prefix.with_name(job.output_prefix.name + ".lock")
    with ExitStack() as stack:
        stack.enter_context(output_lock(lock, f"--output-prefix {job.output_prefix}"))
        outputs = {
            key: _Output(stack.enter_context(_writer(job, key, tokenizer.vocab_size)), tokenizer.vocab_size)
            for key in job.json_keys
        }
        bar = stack.enter_context(Progress("tokenizing", None, "documents", seconds_between_lines))
        for batches in _tokenize_all(job, files):
            for key, batch in batches.items():
                outputs[key].add(batch)
            first = outputs[job.json_keys[0]]
            bar.advance(len(batches[job.json_keys[0]].lengths), f"{first.num_tokens:,} tokens")
        inputs = tuple(_describe(path) for path in files)
        manifests = {}
        for key, output in outputs.items():
            manifests[key] = output.finish(job, key, tokenizer, inputs)
    return manifests


class _Output:
    """The dataset of one column while it is written."""

    def __init__(self, writer: IndexedDatasetWriter, vocab_size: int) -> None:
        self._writer = writer
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        self.num_documents = self.num_empty = self.num_text_bytes = self.num_tokens = 0

    def add(self, batch: _Batch) -> None:
        self._writer.add_documents(batch.lengths, batch.tokens)
        self._counts += np.bincount(batch.tokens, minlength=len(self._counts))
        self.num_documents += len(batch.lengths)
        self.num_tokens += len(batch.tokens)
        self.num_empty += batch.num_empty
        self.num_text_bytes += batch.num_text_bytes

    def finish(
        self,
        job: PreprocessJob,
        key: str,
        tokenizer: SentencePieceTokenizer | JsonTokenizer,
        inputs: tuple[InputRecord, ...],
    ) -> DatasetManifest:
        if self.num_documents == 0:
            raise DataError(f"column {key!r} of {' '.join(job.inputs)} holds no text; check --json-key")
        manifest = DatasetManifest(
            tokenizer=TokenizerRecord.of(tokenizer),
            handler=job.handler_name,
            json_key=key,
            append_eod=job.append_eod,
            token_format=np.dtype(smallest_format(tokenizer.vocab_size)).name,
            num_documents=self.num_documents,
            num_empty_documents=self.num_empty,
            num_tokens=self.num_tokens,
            num_text_bytes=self.num_text_bytes,
            unigram_entropy_nats=entropy_nats(self._counts),
            inputs=inputs,
            versions={"ascendspeed-data": __version__}
            | {name: metadata.version(name) for name in ("sentencepiece", "tokenizers", "numpy")},
            command=" ".join(["asd-data", *sys.argv[1:]]),
        )
        path = manifest_path(job.prefix_of(key))
        path.unlink(missing_ok=True)
        self._writer.finish()
        write_durably(path, manifest.model_dump_json(indent=2) + "\n")
        return manifest


def entropy_nats(counts: NDArray[np.int64]) -> float:
    """Return the entropy of token frequencies: the loss of a model that knows nothing else, nats per token."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _refuse_existing(prefix: Path) -> None:
    for suffix in (".bin", ".idx"):
        path = prefix.with_name(prefix.name + suffix)
        if path.exists():
            raise AscendSpeedError(
                f"{path} exists; give --overwrite to replace it, or another --output-prefix"
            )


def _writer(job: PreprocessJob, key: str, vocab_size: int) -> IndexedDatasetWriter:
    return IndexedDatasetWriter(job.prefix_of(key), smallest_format(vocab_size))


def _texts(job: PreprocessJob, files: Sequence[Path]) -> Iterator[tuple[str, ...]]:
    """Yield the texts of each record, one per column."""
    handler = find_handler(job.handler_name)
    for path in files:
        for number, record in enumerate(read_records(path), 1):
            for key in job.json_keys:
                text_of(record, key, path, number)
            documents = [handler.texts(record, key) for key in job.json_keys]
            for texts in zip(*documents, strict=True):
                _check_unicode(texts, path, number)
                yield texts


def _check_unicode(texts: tuple[str, ...], path: Path, number: int) -> None:
    for text in texts:
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{path}: record {number} holds half a surrogate pair at character {error.start}, which is no text; "
                "repair the record"
            ) from None


def _tokenize_all(job: PreprocessJob, files: Sequence[Path]) -> Iterator[dict[str, _Batch]]:
    """Yield tokenized batches in the order of the input."""
    texts = _texts(job, files)
    batches = iter(lambda: list(islice(texts, RECORDS_PER_BATCH)), [])
    if job.workers == 1:
        for batch in batches:
            yield _tokenize(job, batch)
        return
    with ProcessPoolExecutor(job.workers, mp_context=get_context("spawn")) as pool:
        waiting: deque[Future[dict[str, _Batch]]] = deque()
        try:
            for batch in batches:
                waiting.append(pool.submit(_tokenize, job, batch))
                if len(waiting) >= job.workers * BATCHES_IN_FLIGHT_PER_WORKER:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise AscendSpeedError(
                "a worker process was killed, most often for want of memory; give fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@cache
def _worker_tokenizer(path: Path, kind: str) -> SentencePieceTokenizer | JsonTokenizer:
    return load_tokenizer(path, kind)


def _tokenize(job: PreprocessJob, records: Sequence[tuple[str, ...]]) -> dict[str, _Batch]:
    tokenizer = _worker_tokenizer(job.tokenizer, job.tokenizer_type)
    batches = {}
    for place, key in enumerate(job.json_keys):
        texts = [record[place] for record in records]
        kept = [text for text in texts if text]
        documents = tokenizer.encode_batch(kept)
        if job.append_eod:
            assert tokenizer.eos_id is not None
            for document in documents:
                document.append(tokenizer.eos_id)
        lengths = [len(document) for document in documents]
        tokens = np.fromiter(
            (token for document in documents for token in document), dtype=np.int64, count=sum(lengths)
        )
        num_bytes = sum(len(text.encode("utf-8")) for text in kept)
        batches[key] = _Batch(
            lengths, tokens.astype(smallest_format(tokenizer.vocab_size)), len(texts) - len(kept), num_bytes
        )
    return batches


def _describe(path: Path) -> InputRecord:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return InputRecord(name=path.name, num_bytes=path.stat().st_size, sha256=digest)


def check_options(dataset_impl: str) -> None:
    """Raise `ConfigError` for a layout of files that is no longer written."""
    if dataset_impl != "mmap":
        raise ConfigError(
            f"dataset_impl={dataset_impl} is not written any more; mmap is what megatron-core reads"
        )
