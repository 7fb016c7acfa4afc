"""Tokenize inputs into indexed datasets with a manifest.

Documents keep the order of the input, so the number of workers and the shard size do not change the output. A journal
records progress, and the same command resumes an interrupted run.
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

from ascendspeed_data import __version__
from ascendspeed_data.command_line import Progress, log
from ascendspeed_data.command_line.stopping import InterruptedRunError, keeping
from ascendspeed_data.encoding import INPUT_IDS, ShardEncoder
from ascendspeed_data.errors import AscendSpeedError, ConfigError, DataError
from ascendspeed_data.fast_tokenizer import EncoderChoice, ExactEncoder, choose_encoder
from ascendspeed_data.files import INCOMPLETE, full_disk_named
from ascendspeed_data.handlers import SampleHandler, TextHandler, kind_of
from ascendspeed_data.hub import origins_in
from ascendspeed_data.indexed import IndexedDatasetWriter
from ascendspeed_data.json_tokenizer import JsonTokenizer
from ascendspeed_data.lock import output_lock
from ascendspeed_data.manifest import (
    DatasetManifest,
    FileRecord,
    PackRecord,
    TokenizerRecord,
    read_manifest,
)
from ascendspeed_data.preprocessing.job import PreprocessJob, template_of, tool_use_template_of
from ascendspeed_data.preprocessing.journal import Commit, Journal
from ascendspeed_data.preprocessing.output import DatasetWriter, open_outputs, output_paths, unpacked_paths
from ascendspeed_data.preprocessing.packing import PackCounts, pack_samples
from ascendspeed_data.preprocessing.workers import WorkerTask, encode_shards
from ascendspeed_data.reading.inputs import sha256_of
from ascendspeed_data.reading.shards import Shard
from ascendspeed_data.reading.sources import InputFile, Source, first_shards
from ascendspeed_data.sentencepiece_tokenizer import SentencePieceTokenizer
from ascendspeed_data.token_frequencies import count_ids_in_file, unigram_entropy_nats
from ascendspeed_data.tokenizer import load_tokenizer

SAMPLE_CHARACTERS = 200_000
"""Amount of input on which gigatoken is compared with the tokenizer."""

DOCUMENTS_BETWEEN_LINES = 100


def preprocess_dataset(
    job: PreprocessJob, log_interval: int = DOCUMENTS_BETWEEN_LINES, seconds_between_lines: float = 10.0
) -> dict[str, DatasetManifest]:
    """Tokenize inputs, write the datasets, and return the manifest of each column; samples have the key ``""``.

    Args:
        job: inputs, output, tokenizer, handler and options.
        log_interval: minimum number of documents between two progress lines.
        seconds_between_lines: minimum time between two progress lines.

    Raises:
        ConfigError: an unknown handler, tokenizer type or file format, or options that exclude each other.
        AscendSpeedError: an input cannot be read, an output exists or is in use, or the disk is full. Finished
            documents stay on the disk for the next run.
    """
    handler = job.handler()
    tokenizer = load_tokenizer(job.tokenizer, job.tokenizer_type)
    job.use_chat_template(tokenizer, handler)
    if job.append_eod and tokenizer.eos_id is None:
        raise DataError(
            f"tokenizer {job.tokenizer} has no end-of-sequence token to append to documents; give --no-append-eod"
        )
    sources = job.sources(handler)
    remedy = "free some space and run the same command again: it resumes after the finished documents"
    with (
        output_lock(job.path_with_suffix(".lock"), f"--output-prefix {job.output_prefix}"),
        keeping(lambda: "run the same command again to go on"),
        full_disk_named(job.output_prefix, remedy),
    ):
        choice = choose_encoder(
            tokenizer, job.tokenizer_type, job.use_fast, _sample_texts(job, handler, tokenizer, sources)
        )
        log(f"tokenizer: {choice.name} ({choice.reason})")
        identity = job.identity(tokenizer, handler, choice.name)
        journal = Journal(
            job.path_with_suffix(".journal"), identity, [source.identity() for source in sources]
        )
        run = _PreprocessRun(job, handler, tokenizer, sources, journal, choice)
        return run.run(log_interval, seconds_between_lines)


class _PreprocessRun:
    """One run, new or resumed, until the outputs have their final names."""

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
        commit = self._start_or_resume()
        if commit is not None and commit.renaming:
            return self._rename({})
        outputs = open_outputs(self.job, self._is_samples, self.tokenizer.vocab_size, commit)
        with ExitStack() as stack:
            for output in outputs.values():
                for writer in output.writers.values():
                    stack.enter_context(writer)
            hashes = self._start_hashing(stack)
            try:
                self._tokenize(outputs, commit or Commit(), log_interval, seconds_between_lines)
                self._check_not_empty(outputs)
            except KeyboardInterrupt:
                raise InterruptedRunError(f"interrupted; {self._keep_finished(outputs)}") from None
            except BaseException:
                log(self._keep_finished(outputs))
                raise
            return self._finish(outputs, [record for future in hashes for record in future.result()])

    @property
    def _is_samples(self) -> bool:
        return isinstance(self.handler, SampleHandler)

    def _start_or_resume(self) -> Commit | None:
        """Decide where to start, and log it."""
        try:
            commit = self.journal.resume()
        except AscendSpeedError as error:
            if not self.job.overwrite:
                raise
            log(f"--overwrite: discarding an interrupted run ({error})")
            commit = None
        if commit is None and not self.job.overwrite:
            self._refuse_existing()
        if commit is None:
            self.journal.start()
        elif commit.renaming:
            log("all documents are tokenized; renaming the files")
        else:
            done = sum(state.num_documents for state in list(commit.outputs.values())[:1])
            log(f"resuming after {done:,} documents of an interrupted run")
        return commit

    def _refuse_existing(self) -> None:
        for paths in output_paths(self.job, self._is_samples).values():
            for path in paths.files[:-1]:
                if path.exists():
                    raise AscendSpeedError(
                        f"{path} already exists; give --overwrite to replace it, or another --output-prefix"
                    )

    def _start_hashing(self, stack: ExitStack) -> list[Future[list[InputFile]]]:
        """Hash the inputs in a thread while others tokenize; hashing releases the interpreter lock."""
        pool = ThreadPoolExecutor(1)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        return [pool.submit(source.describe) for source in self.sources]

    def _tokenize(
        self,
        outputs: dict[str, DatasetWriter],
        commit: Commit,
        log_interval: int,
        seconds_between_lines: float,
    ) -> None:
        job = self.job
        task = WorkerTask(
            job.handler_name, job.keys, job.append_eod, self.choice,
            self.tokenizer.chat_template if job.chat_template else None, job.parse_special,
            self.tokenizer.template_values, dict(job.columns),
        )  # fmt: skip
        held = 0
        last: Shard | None = None
        with Progress("tokenizing", None, "documents", seconds_between_lines) as bar:
            for shard, encoded in encode_shards(task, self._shards(commit), job.workers):
                if last is not None and shard.input_index != last.input_index:
                    self._commit(outputs, shard.input_index, 0)
                for key, documents in encoded.items():
                    outputs[key].add(documents)
                first = next(iter(outputs.values()))
                held += next(iter(encoded.values())).counts.num_documents
                if held >= log_interval:
                    bar.advance(held, f"{first.counts.num_tokens:,} tokens")
                    held = 0
                if self.journal.is_due():
                    self._commit(outputs, shard.input_index, shard.end)
                last = shard
        self._commit(outputs, len(self.sources), 0)

    def _shards(self, commit: Commit) -> Iterator[Shard]:
        for number, source in enumerate(self.sources):
            if number >= commit.input_index:
                start = commit.offset if number == commit.input_index else 0
                yield from source.shards(number, start, self.job.shard_bytes)

    def _commit(
        self, outputs: dict[str, DatasetWriter], input_index: int, offset: int, renaming: bool = False
    ) -> None:
        writers = [writer for output in outputs.values() for writer in output.writers.values()]

        def flush() -> None:
            for writer in writers:
                writer.flush()

        self.journal.commit(
            Commit(
                input_index,
                offset,
                {writer.prefix.name: writer.state for writer in writers},
                {key: vars(output.counts) for key, output in outputs.items()},
                renaming,
            ),
            flush,
        )

    def _check_not_empty(self, outputs: dict[str, DatasetWriter]) -> None:
        for key, output in outputs.items():
            if output.counts.num_documents == 0:
                read = " ".join(self.job.inputs) or self.job.hf_datasets_params
                if not key:
                    raise DataError(
                        f"no record of {read} has something to learn; check --handler-name and its columns"
                    )
                raise DataError(f"column {key!r} of {read} has no text; check --json-key")

    def _keep_finished(self, outputs: dict[str, DatasetWriter]) -> str:
        """Keep the documents that the journal records, and say so; if there are none, delete everything."""
        kept = self.journal.documents_kept()
        if kept:
            return f"{kept:,} documents are finished; run the same command again to resume after them"
        for output in outputs.values():
            for writer in output.writers.values():
                writer.keep = False
        self.journal.remove()
        return "no document is finished, and nothing is kept"

    def _finish(
        self, outputs: dict[str, DatasetWriter], inputs: Sequence[InputFile]
    ) -> dict[str, DatasetManifest]:
        """Complete every file under a temporary name, record that in the journal, then rename all files."""
        changed = [
            entry[0]
            for source, entry in zip(self.sources, self.journal.inputs, strict=True)
            if source.identity() != entry
        ]
        if changed:
            raise DataError(f"{changed[0]} changed while this run read it; run the same command again")
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

    def _pack(self, outputs: dict[str, DatasetWriter]) -> tuple[dict[str, DatasetWriter], PackCounts]:
        assert self.job.seq_length is not None
        target = output_paths(self.job, is_samples=True)[""]
        pairs = {
            array: IndexedDatasetWriter(prefix, np.int32, keep=True)
            for array, prefix in target.prefixes.items()
        }
        counts = pack_samples(unpacked_paths(self.job).prefixes, pairs, self.job.seq_length)
        for writer in pairs.values():
            writer.flush()
        before = outputs[""]
        ids = IndexedDatasetWriter.scratch_paths(target.prefixes[INPUT_IDS])[0]
        new_counts = replace(
            before.counts,
            num_documents=counts.num_packs,
            num_sequences=counts.num_samples,
            num_tokens=counts.num_tokens,
            num_trained_tokens=counts.num_trained_tokens,
        )
        frequencies = count_ids_in_file(ids, np.int32, self.tokenizer.vocab_size)
        return {"": DatasetWriter("", before.manifest, pairs, new_counts, frequencies)}, counts

    def _manifest(
        self,
        output: DatasetWriter,
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
            tokenizer=TokenizerRecord.from_tokenizer(self.tokenizer),
            encoder=self.choice.name,
            handler=job.handler_name,
            template=template,
            tool_use_template=tool_use_template_of(self.handler, self.tokenizer),
            template_sha256=hashlib.sha256(template.encode()).hexdigest(),
            json_key=output.key or None,
            append_eod=job.append_eod,
            parse_special=job.parse_special,
            chat_template_kwargs=self.tokenizer.template_values.kwargs,
            chat_template_date=self.tokenizer.template_values.day,
            reasoning=self.tokenizer.template_values.reasoning,
            columns=dict(job.columns),
            hub=tuple(origins_in([self.tokenizer.path, *map(Path, job.inputs)])),
            seq_length=job.seq_length,
            pack=pack,
            token_format=output.first.format.name,
            unigram_entropy_nats=unigram_entropy_nats(output.frequencies),
            inputs=tuple(FileRecord(**vars(record)) for record in inputs),
            files=tuple(files),
            versions={"ascendspeed-data": __version__}
            | {name: metadata.version(name) for name in ("sentencepiece", "tokenizers", "numpy")},
            command=" ".join(["asd-data", *sys.argv[1:]]),
            **vars(output.counts),
        )

    def _rename(self, manifests: dict[str, DatasetManifest]) -> dict[str, DatasetManifest]:
        """Rename the complete files; this can be repeated after a crash."""
        outputs = output_paths(self.job, self._is_samples)
        for paths in outputs.values():
            if _scratch(paths.manifest).exists():
                paths.manifest.unlink(missing_ok=True)
        for paths in outputs.values():
            for path in paths.files:
                if _scratch(path).exists():
                    _scratch(path).replace(path)
        for key, paths in outputs.items():
            if key not in manifests:
                manifests[key] = read_manifest(paths.manifest)
        leftovers = [path for paths in outputs.values() for path in paths.scratch]
        for path in (*leftovers, *(unpacked_paths(self.job).scratch if self.job.pack else ())):
            path.unlink(missing_ok=True)
        self.journal.remove()
        return manifests


def _scratch(path: Path) -> Path:
    return path.with_name(path.name + INCOMPLETE)


def _sample_texts(
    job: PreprocessJob,
    handler: TextHandler | SampleHandler,
    tokenizer: SentencePieceTokenizer | JsonTokenizer,
    sources: Sequence[Source],
) -> list[str]:
    """Return text from the start of the input; this also finds unreadable input early."""
    for shard in islice(first_shards(sources, SAMPLE_CHARACTERS), 1):
        if isinstance(handler, TextHandler):
            reader = ShardEncoder(
                handler,
                job.keys,
                job.append_eod,
                tokenizer,
                ExactEncoder(tokenizer),
                columns=dict(job.columns),
            )
            found = [text for _, outputs in reader.texts(shard) for texts in outputs for text in texts]
        else:
            from ascendspeed_data.reading.records import records_of_shard

            found = [str(value) for _, record in records_of_shard(shard) for value in record.values()]
        kept, size = [], 0
        for text in found:
            if size + len(text) > SAMPLE_CHARACTERS:
                break
            kept.append(text.encode("utf-8", errors="replace").decode())
            size += len(text)
        return kept
    return []


def check_options(dataset_impl: str) -> None:
    """Raise `ConfigError` unless `--dataset-impl` is mmap."""
    if dataset_impl != "mmap":
        raise ConfigError(
            f"dataset_impl={dataset_impl} is not supported; megatron-core reads mmap only, so leave it out"
        )
