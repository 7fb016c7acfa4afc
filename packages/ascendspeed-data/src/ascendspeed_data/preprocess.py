"""Tokenize inputs into indexed datasets with a manifest.

Documents keep the order of the input, so the bytes are the same for any number of workers and any size of shard. What
is done is journalled: the same command goes on where an earlier run was cut off.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ascendspeed_data import __version__
from ascendspeed_data.command_line import Progress, log
from ascendspeed_data.encoding import INPUT_IDS, ShardEncoder
from ascendspeed_data.errors import AscendSpeedError, ConfigError, DataError
from ascendspeed_data.fast_tokenizer import EncoderChoice, ExactEncoder, choose_encoder
from ascendspeed_data.files import INCOMPLETE, full_disk_named
from ascendspeed_data.handlers import SampleHandler, TextHandler, kind_of
from ascendspeed_data.indexed import IndexedDatasetWriter
from ascendspeed_data.job import PreprocessJob, read_chat_template, template_of
from ascendspeed_data.journal import Commit, Journal
from ascendspeed_data.lock import output_lock
from ascendspeed_data.manifest import (
    DatasetManifest,
    FileRecord,
    PackRecord,
    TokenizerRecord,
    read_manifest,
)
from ascendspeed_data.output import Output, open_outputs, output_places, unpacked_places
from ascendspeed_data.packing import PackCounts, frequencies_in, pack_samples
from ascendspeed_data.reading.inputs import sha256_of
from ascendspeed_data.reading.shards import Shard
from ascendspeed_data.reading.sources import InputFile, Source, first_records
from ascendspeed_data.tokenizer import JsonTokenizer, SentencePieceTokenizer, load_tokenizer
from ascendspeed_data.workers import WorkerTask, encode_all

SAMPLE_CHARACTERS = 200_000
"""Text of the input on which the fast tokenizer is compared with the exact one."""

DOCUMENTS_BETWEEN_LINES = 100


def preprocess(
    job: PreprocessJob, log_interval: int = DOCUMENTS_BETWEEN_LINES, seconds_between_lines: float = 10.0
) -> dict[str, DatasetManifest]:
    """Tokenize, write, and return the manifest of each column; of samples under the name ``""``.

    Args:
        job: what to do.
        log_interval: documents between two lines of progress, at least.
        seconds_between_lines: time between two lines of progress, at least.

    Raises:
        ConfigError: an unknown handler, tokenizer type or ending, or options that exclude each other.
        AscendSpeedError: an input that cannot be read, an output that exists or is being written, a full disk. What
            was done until then is kept for the next run.
    """
    handler = job.handler()
    tokenizer = load_tokenizer(job.tokenizer, job.tokenizer_type)
    if job.chat_template is not None:
        tokenizer.chat_template = read_chat_template(job.chat_template)
    if job.append_eod and tokenizer.eos_id is None:
        raise DataError(
            f"tokenizer {job.tokenizer} names no end-of-sequence id to end documents with; give --no-append-eod"
        )
    sources = job.sources(handler)
    remedy = "make room and give the same command again: it goes on with what was written"
    with (
        output_lock(job.beside(".lock"), f"--output-prefix {job.output_prefix}"),
        full_disk_named(job.output_prefix, remedy),
    ):
        choice = choose_encoder(
            tokenizer, job.tokenizer_type, job.use_fast, _sample_texts(job, handler, tokenizer, sources)
        )
        log(f"tokenizer: {choice.name} ({choice.reason})")
        identity = job.identity(tokenizer, handler, choice.name)
        journal = Journal(job.beside(".journal"), identity, [source.identity() for source in sources])
        run = _Run(job, handler, tokenizer, sources, journal, choice)
        return run.run(log_interval, seconds_between_lines)


class _Run:
    """One run from its start, or from where an earlier one was cut off, to the names of the outputs."""

    def __init__(
        self,
        job: PreprocessJob,
        handler: TextHandler | SampleHandler,
        tokenizer: SentencePieceTokenizer | JsonTokenizer,
        sources: Sequence[Source],
        journal: Journal,
        choice: EncoderChoice,
    ) -> None:
        self.job, self.handler, self.tokenizer, self.sources = job, handler, tokenizer, sources
        self.journal, self.choice = journal, choice

    def run(self, log_interval: int, seconds_between_lines: float) -> dict[str, DatasetManifest]:
        commit = self._begin()
        if commit is not None and commit.renaming:
            return self._rename({})
        outputs = open_outputs(self.job, self._of_samples, self.tokenizer.vocab_size, commit)
        with ExitStack() as stack:
            for output in outputs.values():
                for writer in output.writers.values():
                    stack.enter_context(writer)
            hashes = self._start_hashing(stack)
            try:
                self._tokenize(outputs, commit or Commit(), log_interval, seconds_between_lines)
                self._check_not_empty(outputs)
            except BaseException:
                self._leave(outputs)
                raise
            return self._finish(outputs, [record for future in hashes for record in future.result()])

    @property
    def _of_samples(self) -> bool:
        return isinstance(self.handler, SampleHandler)

    def _begin(self) -> Commit | None:
        """Decide where to begin, and say so."""
        try:
            commit = self.journal.resume()
        except AscendSpeedError as error:
            if not self.job.overwrite:
                raise
            log(f"--overwrite: discarding an unfinished run ({error})")
            commit = None
        if commit is None and not self.job.overwrite:
            self._refuse_existing()
        if commit is None:
            self.journal.start()
        elif commit.renaming:
            log("all documents are tokenized already; giving the files their names")
        else:
            done = sum(state.num_documents for state in list(commit.outputs.values())[:1])
            log(f"going on after {done:,} documents that an earlier run wrote")
        return commit

    def _refuse_existing(self) -> None:
        for places in output_places(self.job, self._of_samples).values():
            for path in places.files[:-1]:
                if path.exists():
                    raise AscendSpeedError(
                        f"{path} exists; give --overwrite to replace it, or another --output-prefix"
                    )

    def _start_hashing(self, stack: ExitStack) -> list[Future[list[InputFile]]]:
        """Hash the inputs beside the tokenizing; hashing leaves the interpreter to others."""
        pool = ThreadPoolExecutor(1)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        return [pool.submit(source.describe) for source in self.sources]

    def _tokenize(
        self, outputs: dict[str, Output], commit: Commit, log_interval: int, seconds_between_lines: float
    ) -> None:
        job = self.job
        task = WorkerTask(
            job.handler_name, job.keys, job.append_eod, self.choice,
            self.tokenizer.chat_template if job.chat_template else None,
        )  # fmt: skip
        held = 0
        last: Shard | None = None
        with Progress("tokenizing", None, "documents", seconds_between_lines) as bar:
            for shard, encoded in encode_all(task, self._shards(commit), job.workers):
                if last is not None and shard.file != last.file:
                    self._commit(outputs, shard.file, 0)
                for key, part in encoded.items():
                    outputs[key].add(part)
                first = next(iter(outputs.values()))
                held += next(iter(encoded.values())).counts.num_documents
                if held >= log_interval:
                    bar.advance(held, f"{first.counts.num_tokens:,} tokens")
                    held = 0
                if self.journal.is_due():
                    self._commit(outputs, shard.file, shard.end)
                last = shard
        self._commit(outputs, len(self.sources), 0)

    def _shards(self, commit: Commit) -> Iterator[Shard]:
        for number, source in enumerate(self.sources):
            if number >= commit.file:
                start = commit.place if number == commit.file else 0
                yield from source.shards(number, start, self.job.shard_bytes)

    def _commit(self, outputs: dict[str, Output], file: int, place: int, renaming: bool = False) -> None:
        writers = [writer for output in outputs.values() for writer in output.writers.values()]

        def flush() -> None:
            for writer in writers:
                writer.to_disk()

        self.journal.commit(
            Commit(
                file,
                place,
                {writer.prefix.name: writer.state for writer in writers},
                {key: vars(output.counts) for key, output in outputs.items()},
                renaming,
            ),
            flush,
        )

    def _check_not_empty(self, outputs: dict[str, Output]) -> None:
        for key, output in outputs.items():
            if output.counts.num_documents == 0:
                what = f"column {key!r}" if key else "what the handler made"
                raise DataError(f"{what} of {' '.join(self.job.inputs)} holds no text; check --json-key")

    def _leave(self, outputs: dict[str, Output]) -> None:
        """Keep what the journal vouches for; if that is nothing, leave nothing."""
        kept = self.journal.documents_kept()
        if kept:
            log(f"{kept:,} documents are kept; the same command goes on after them")
            return
        for output in outputs.values():
            for writer in output.writers.values():
                writer.keep = False
        self.journal.remove()

    def _finish(self, outputs: dict[str, Output], inputs: Sequence[InputFile]) -> dict[str, DatasetManifest]:
        """Prepare every file under a temporary name, note that, and give all of them their names."""
        changed = [
            entry[0]
            for source, entry in zip(self.sources, self.journal.inputs, strict=True)
            if source.identity() != entry
        ]
        if changed:
            raise DataError(f"{changed[0]} was changed while it was read; run the same command again")
        manifests = {}
        packed: PackCounts | None = None
        unpacked = outputs
        if self.job.pack:
            outputs, packed = self._pack(outputs)
        for key, output in outputs.items():
            files = []
            for writer in output.writers.values():
                for source_path, target in writer.prepare():
                    files.append(
                        FileRecord(
                            name=target.name,
                            num_bytes=source_path.stat().st_size,
                            sha256=sha256_of(source_path),
                        )
                    )
            manifests[key] = self._manifest(output, inputs, files, packed)
            content = manifests[key].model_dump_json(indent=2) + "\n"
            _scratch(output.manifest).write_text(content, encoding="utf-8")
        self._commit(unpacked, len(self.sources), 0, renaming=True)
        return self._rename(manifests)

    def _pack(self, outputs: dict[str, Output]) -> tuple[dict[str, Output], PackCounts]:
        assert self.job.seq_length is not None
        target = output_places(self.job, of_samples=True)[""]
        pairs = {
            array: IndexedDatasetWriter(prefix, np.int32, keep=True)
            for array, prefix in target.prefixes.items()
        }
        counts = pack_samples(unpacked_places(self.job).prefixes, pairs, self.job.seq_length)
        for writer in pairs.values():
            writer.to_disk()
        before = outputs[""]
        ids = IndexedDatasetWriter.scratch_paths(target.prefixes[INPUT_IDS])[0]
        new_counts = replace(
            before.counts,
            num_documents=counts.num_packs,
            num_sequences=counts.num_samples,
            num_tokens=counts.num_tokens,
            num_trained_tokens=counts.num_trained_tokens,
        )
        frequencies = frequencies_in(ids, np.int32, self.tokenizer.vocab_size)
        return {"": Output("", before.manifest, pairs, new_counts, frequencies)}, counts

    def _manifest(
        self,
        output: Output,
        inputs: Sequence[InputFile],
        files: Sequence[FileRecord],
        packed: PackCounts | None,
    ) -> DatasetManifest:
        job = self.job
        template = template_of(self.handler, self.tokenizer)
        pack = None
        if packed is not None and job.seq_length is not None:
            pack = PackRecord(
                seq_length=job.seq_length,
                padding_share=1 - packed.num_tokens / (job.seq_length * max(packed.num_packs, 1)),
                padding_share_unpacked=1 - packed.num_tokens / (job.seq_length * max(packed.num_samples, 1)),
                num_cut_samples=packed.num_cut_samples,
                num_dropped_samples=packed.num_dropped_samples,
            )
        return DatasetManifest(
            kind=kind_of(self.handler),
            tokenizer=TokenizerRecord.of(self.tokenizer),
            encoder=self.choice.name,
            handler=job.handler_name,
            template=template,
            template_sha256=hashlib.sha256(template.encode()).hexdigest(),
            json_key=output.key or None,
            append_eod=job.append_eod,
            seq_length=job.seq_length,
            pack=pack,
            token_format=output.first.format.name,
            unigram_entropy_nats=entropy_nats(output.frequencies),
            inputs=tuple(FileRecord(**vars(record)) for record in inputs),
            files=tuple(files),
            versions={"ascendspeed-data": __version__}
            | {name: metadata.version(name) for name in ("sentencepiece", "tokenizers", "numpy")},
            command=" ".join(["asd-data", *sys.argv[1:]]),
            **vars(output.counts),
        )

    def _rename(self, manifests: dict[str, DatasetManifest]) -> dict[str, DatasetManifest]:
        """Give the files their names; all of them are complete, so this may be done again after a crash."""
        outputs = output_places(self.job, self._of_samples)
        for places in outputs.values():
            if _scratch(places.manifest).exists():
                places.manifest.unlink(missing_ok=True)
        for places in outputs.values():
            for path in places.files:
                if _scratch(path).exists():
                    _scratch(path).replace(path)
        for key, places in outputs.items():
            if key not in manifests:
                manifests[key] = read_manifest(places.manifest)
        leftovers = [path for places in outputs.values() for path in places.scratch]
        for path in (*leftovers, *(unpacked_places(self.job).scratch if self.job.pack else ())):
            path.unlink(missing_ok=True)
        self.journal.remove()
        return manifests


def entropy_nats(counts: NDArray[np.int64]) -> float:
    """Return the entropy of token frequencies: the loss of a model that knows nothing else, nats per token."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def _scratch(path: Path) -> Path:
    return path.with_name(path.name + INCOMPLETE)


def _sample_texts(
    job: PreprocessJob,
    handler: TextHandler | SampleHandler,
    tokenizer: SentencePieceTokenizer | JsonTokenizer,
    sources: Sequence[Source],
) -> list[str]:
    """Return text from the beginning of the input; an input that cannot be read complains here already."""
    for shard in islice(first_records(sources, SAMPLE_CHARACTERS), 1):
        if isinstance(handler, TextHandler):
            reader = ShardEncoder(handler, job.keys, job.append_eod, tokenizer, ExactEncoder(tokenizer))
            found = [text for _, outputs in reader.texts(shard) for texts in outputs for text in texts]
        else:
            from ascendspeed_data.reading.records import records_of

            found = [str(value) for _, record in records_of(shard) for value in record.values()]
        kept, size = [], 0
        for text in found:
            if size + len(text) > SAMPLE_CHARACTERS:
                break
            kept.append(text.encode("utf-8", errors="replace").decode())
            size += len(text)
        return kept
    return []


def check_options(dataset_impl: str) -> None:
    """Raise `ConfigError` for a layout of files that is no longer written."""
    if dataset_impl != "mmap":
        raise ConfigError(
            f"dataset_impl={dataset_impl} is not written any more; mmap is what megatron-core reads"
        )
