"""Datasets that a training run makes of its input once: their names have the hash of all that decides their bytes."""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

from ascendspeed_data import __version__
from ascendspeed_data.column_names import renamed
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import DataError
from ascendspeed_data.handlers.detection import Wanted, detected_handler
from ascendspeed_data.manifest import DatasetManifest, load_manifest
from ascendspeed_data.preprocess import preprocess_dataset
from ascendspeed_data.preprocessing.job import PreprocessJob
from ascendspeed_data.preprocessing.report import report
from ascendspeed_data.reading.inputs import sha256_of
from ascendspeed_data.reading.records import records_of_shard
from ascendspeed_data.reading.sources import FileSource, first_shards
from ascendspeed_data.tokenizer import load_tokenizer

SECONDS_BETWEEN_LOOKS = 0.2


def with_detected_handler(job: PreprocessJob, wanted: Wanted) -> PreprocessJob:
    """Return a job with the handler that fits its first record.

    Raises:
        DataError: none fits, or several do.
    """
    source = next(iter(job.input_files()))
    for shard in first_shards([FileSource(source)], 1):
        for _, record in records_of_shard(shard):
            try:
                name = detected_handler(renamed(record, dict(job.columns)), wanted)
            except DataError as error:
                raise DataError(f"{source}: {error}") from None
            return replace(job, handler_name=name)
    raise DataError(f"{source} has no records; remove it from --data")


def cached_dataset(
    job: PreprocessJob, folder: Path, only_waits: bool = False
) -> tuple[Path, DatasetManifest]:
    """Make the samples or pairs of a job in a folder, unless they are there, and return their prefix and manifest.

    The files are those of `asd-data preprocess` with the same options, byte for byte.

    Args:
        job: whose output prefix is replaced.
        folder: of the cache.
        only_waits: whether another process makes them.

    Raises:
        AscendSpeedError: as `preprocess_dataset`.
    """
    prefix = folder / f"data-{digest_of(job)}"
    job = replace(job, output_prefix=prefix)
    while (manifest := _finished(job)) is None:
        if only_waits:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            continue
        log(f"data: {' '.join(job.inputs)} through {job.handler_name}, into {prefix}")
        folder.mkdir(parents=True, exist_ok=True)
        manifests = preprocess_dataset(job)
        report(job, manifests)
    return prefix, manifest


def digest_of(job: PreprocessJob) -> str:
    """Return a hash of the inputs' bytes and of every option that decides those of the output."""
    handler = job.handler()
    tokenizer = load_tokenizer(job.tokenizer, job.tokenizer_type)
    job.use_chat_template(tokenizer, handler)
    identity = job.identity(tokenizer, handler, "")
    content = [__version__, identity, [sha256_of(path) for path in job.input_files()]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _finished(job: PreprocessJob) -> DatasetManifest | None:
    """Return the manifest of a finished dataset; the journal of a run is removed last."""
    is_running = job.path_with_suffix(".journal").exists()
    return None if is_running else load_manifest(job.path_with_suffix("_packed"))
