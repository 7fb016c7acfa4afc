"""Convert a checkpoint to another kind, and prove the result equal before the folder gets its final name."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascendspeed_ckpt.comparison import Comparison, compare
from ascendspeed_ckpt.config import MP_RANK_KINDS, TargetKind
from ascendspeed_ckpt.writers.huggingface import write_hugging_face
from ascendspeed_ckpt.writers.mp_rank import write_mp_rank
from ascendspeed_ckpt.writers.native import write_native
from ascendspeed_ckpt.writers.torch_dist import write_torch_dist
from ascendspeed_ckpt.writers.write_plan import WritePlan
from ascendspeed_core.models.families.config_rules import written_end_ids
from ascendspeed_core.weights import NativeSource, WeightSource, open_weights, stored_source
from ascendspeed_core.weights.adapters.merge import MergedAdapter
from ascendspeed_core.weights.files.json_file import read_json
from ascendspeed_core.weights.source import DATA_MANIFEST, LeftOut
from ascendspeed_core.weights.stream import SLAB_BYTES
from ascendspeed_data.command_line import Progress, log
from ascendspeed_data.errors import AscendSpeedError, DataError
from ascendspeed_data.files import INCOMPLETE
from ascendspeed_data.lock import output_lock
from ascendspeed_data.tokenizer import copy_tokenizer, load_tokenizer

MAX_PARAMETERS_FOR_LOGITS = 1_000_000_000
LOGITS_TOLERANCE = 1e-4
"""Largest accepted difference of fp32 logits: the same sums, in the order of two libraries."""

GENERATION = "generation_config.json"
MERGED = "merged_from.json"
"""File beside merged weights: which base and which adapter they were made of."""


@dataclass(frozen=True)
class Conversion:
    """One conversion.

    Attributes:
        source: checkpoint to read, of any kind; a folder, or an open source.
        target: folder to write.
        to: kind of the target.
        dtype: dtype of the written weights; `None` keeps the stored one.
        tokenizer: folder of the tokenizer to copy; `None` copies the one of the source.
        max_shard_bytes: largest weight file of a Hugging Face folder.
        pickled: write `.bin` files instead of safetensors into a Hugging Face folder.
        write_plan: layout and names of an external checkpoint.
        verify_logits: compare the logits of both models on the CPU; `None` does so below a billion parameters.
        workers: files written at once; `None` is one per core, at most 8.
        overwrite: replace a target that exists.
    """

    source: Path | WeightSource
    target: Path
    to: TargetKind
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    max_shard_bytes: int = 5_000_000_000
    pickled: bool = False
    write_plan: WritePlan | None = None
    verify_logits: bool | None = None
    workers: int | None = None
    overwrite: bool = False

    @property
    def num_workers(self) -> int:
        """Files written at once."""
        return self.workers or min(len(os.sched_getaffinity(0)), 8)


@dataclass(frozen=True)
class Verdict:
    """What a conversion did and proved.

    Attributes:
        num_tensors: tensors of the model; each was read once, written once and compared.
        num_compared_bytes: bytes of these tensors.
        left_out: tensors of the input that are no weights of the model, with the reason for each.
        num_bytes: bytes of tensors written, with copies and padding.
        seconds: from the first read until all bytes are on the disk, without checks.
        flush_seconds: the part of `seconds` that flushing to the disk took.
        check_seconds: checksums, comparison of all tensors, and logits.
        comparison: result of reading every written tensor back and comparing it with the source, as converted.
        checked: what else was proved, in words.
        not_converted: what the source holds and the target does not.
    """

    num_tensors: int
    num_compared_bytes: int
    left_out: tuple[LeftOut, ...]
    num_bytes: int
    seconds: float
    flush_seconds: float
    check_seconds: float
    comparison: Comparison
    checked: tuple[str, ...]
    not_converted: tuple[str, ...]


def convert(conversion: Conversion) -> Verdict:
    """Convert a checkpoint: write it under a temporary name, prove it equal to the source, and rename it.

    Args:
        conversion: what to convert, and how.

    Returns:
        What was proved.

    Raises:
        AscendSpeedError: the source cannot be read, the target exists, or the result is not equal.
    """
    source = conversion.source
    if isinstance(source, Path):
        source = open_weights(source)
    target = conversion.target
    _check_folders(conversion, source)
    scratch = target.with_name(f"{target.name}{INCOMPLETE}")
    lock = target.with_name(f"{target.name}.lock")
    with output_lock(lock, f"--output-model-dir {target}"):
        shutil.rmtree(scratch, ignore_errors=True)
        _check_space(conversion, source)
        scratch.mkdir(parents=True)
        started = time.perf_counter()
        num_bytes = _write(conversion, source, scratch)
        _copy_texts(conversion, source, scratch)
        written = time.perf_counter()
        _flush(scratch)
        flushed = time.perf_counter()
        comparison, checked = _verify(conversion, source, scratch)
        check_seconds = time.perf_counter() - flushed
        _rename(scratch, target)
    return Verdict(
        comparison.num_tensors,
        comparison.num_bytes,
        tuple(source.left_out()),
        num_bytes,
        flushed - started,
        flushed - written,
        check_seconds,
        comparison,
        checked,
        tuple(not_converted(source, conversion)),
    )


def what_is_kept(target: Path, was_taken: bool) -> str:
    """Say what a conversion that ends early has kept; its scratch folder is removed.

    Args:
        target: of the conversion.
        was_taken: whether something was there before.
    """
    scratch, old = target.with_name(f"{target.name}{INCOMPLETE}"), _replaced(target)
    if old.exists() and not target.exists():
        old.rename(target)
    is_complete = is_taken(target) and not scratch.exists()
    shutil.rmtree(scratch, ignore_errors=True)
    if is_complete and not was_taken:
        return f"{target} is written and complete; asd-ckpt verify compares it with the input"
    return f"{target} {'holds a whole checkpoint' if was_taken else 'was not written'}; run the same command again"


def total_bytes(source: WeightSource, dtype: torch.dtype | None, write_plan: WritePlan | None = None) -> int:
    """Return the bytes of all tensors that are written; external formats hold copies and padding."""
    stored = source.tensors()
    if write_plan is not None and write_plan.kind in MP_RANK_KINDS:
        return sum(
            write_plan.info(packed, stored).num_bytes
            for _, chunks in write_plan.plan(source)
            for chunk in chunks
            for packed in chunk
        )
    return sum(
        info.num_bytes // info.dtype.itemsize * (dtype or info.dtype).itemsize for info in stored.values()
    )


def memory_bytes(source: WeightSource, workers: int) -> int:
    """Return how many bytes of tensors are in memory at once, at most: a slab in two formats for each worker."""
    rows = (info.num_bytes // max(info.shape[0], 1) for info in source.tensors().values())
    return workers * 3 * max(SLAB_BYTES, *rows)


def not_converted(source: WeightSource, conversion: Conversion) -> list[str]:
    """Name what the source holds beside the weights and the target will not hold."""
    return [] if _moves_training_state(source, conversion) else stored_source(source).other_contents()


def _moves_training_state(source: WeightSource, conversion: Conversion) -> bool:
    """Tell whether optimizer state goes along: between native checkpoints whose weights stay as they are."""
    return isinstance(source, NativeSource) and conversion.to == "native" and conversion.dtype is None


def is_taken(target: Path) -> bool:
    """Whether something is at a path; an empty folder is as good as nothing."""
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def _check_folders(conversion: Conversion, source: WeightSource) -> None:
    target = conversion.target
    if is_taken(target) and not conversion.overwrite:
        raise AscendSpeedError(
            f"output_model_dir={target} exists; give --overwrite to replace it, or another folder"
        )
    if source.path is not None:
        read, written = source.path.resolve(), target.resolve()
        if read == written or written in read.parents or read in written.parents:
            raise AscendSpeedError(
                f"output_model_dir={target} and the input {source.path} lie inside each other; choose another folder"
            )


def _check_space(conversion: Conversion, source: WeightSource) -> None:
    parent = next(folder for folder in conversion.target.resolve().parents if folder.is_dir())
    needed, free = (
        total_bytes(source, conversion.dtype, conversion.write_plan),
        shutil.disk_usage(parent).free,
    )
    if needed > free:
        raise AscendSpeedError(
            f"{parent} has {free:,} bytes free, but {conversion.target} needs {needed:,}; free some space or "
            "choose another disk"
        )


def _write(conversion: Conversion, source: WeightSource, folder: Path) -> int:
    total = total_bytes(source, conversion.dtype, conversion.write_plan)
    workers = conversion.num_workers
    with Progress("writing", total, "bytes") as bar:
        on_bytes: Callable[[int], None] = bar.advance
        if conversion.to == "huggingface":
            write_hugging_face(
                source,
                folder,
                conversion.dtype,
                conversion.max_shard_bytes,
                on_bytes,
                workers,
                conversion.pickled,
            )
        elif conversion.to == "native":
            state = source if _moves_training_state(source, conversion) else None
            write_native(source, folder, conversion.dtype, on_bytes, workers, state)  # type: ignore[arg-type]
        else:
            assert conversion.write_plan is not None
            write: Any = write_mp_rank if conversion.to in MP_RANK_KINDS else write_torch_dist
            write(source, folder, conversion.write_plan, workers, on_bytes)
    return total


def _copy_texts(conversion: Conversion, source: WeightSource, folder: Path) -> None:
    """Copy tokenizer, generation config and the record of the training data; note what was merged."""
    tokenizer = conversion.tokenizer or source.tokenizer
    to = folder if conversion.to == "huggingface" else folder / "tokenizer"
    if tokenizer is None:
        log(f"no tokenizer: {source.path} has none, and --tokenizer-name-or-path names none")
    elif not copy_tokenizer(tokenizer, to):
        raise AscendSpeedError(f"{tokenizer} holds no tokenizer file; check --tokenizer-name-or-path")
    else:
        try:
            load_tokenizer(tokenizer)
        except DataError as error:
            log(f"the tokenizer was copied as it is, but it cannot be opened: {error}")
    if source.path is not None and (source.path / GENERATION).is_file():
        _copy_generation_config(source, source.path / GENERATION, folder / GENERATION)
    manifest = source.data_manifest
    if manifest is not None and conversion.tokenizer is None and tokenizer is not None:
        (folder / DATA_MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    elif manifest is not None:
        log(
            f"left out: the record of the data that {source.path} was trained on, which speaks of its own tokenizer"
        )
    if isinstance(source, MergedAdapter):
        record = {"base": str(source.path), "base_kind": source.kind, "adapter": str(source.adapter.folder)}
        (folder / MERGED).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _copy_generation_config(source: WeightSource, path: Path, target: Path) -> None:
    """Copy a generation config, with the ids that begin and end a text where the conversion changes them."""
    shutil.copyfile(path, target)
    before, after = stored_source(source).config, source.config
    changed: dict[str, Any] = {}
    if after.bos_token_id != before.bos_token_id:
        changed["bos_token_id"] = after.bos_token_id
    if after.eos_token_ids != before.eos_token_ids:
        changed["eos_token_id"] = written_end_ids(after)
    if changed:
        target.write_text(json.dumps(read_json(path) | changed, indent=2) + "\n", encoding="utf-8")


def _verify(conversion: Conversion, source: WeightSource, folder: Path) -> tuple[Comparison, tuple[str, ...]]:
    """Prove that both checkpoints are undamaged and equal.

    Raises:
        AscendSpeedError: they are not.
    """
    checked = []
    written = open_weights(folder, conversion.to)
    for what, opened in (("input", stored_source(source)), ("output", written)):
        if opened.check():
            checked.append(f"checksums of the {what} are right")
    comparison = compare(source, written, conversion.dtype, workers=conversion.num_workers)
    if not comparison.equal:
        raise AscendSpeedError(
            f"the written checkpoint differs from {source.path}: {comparison.summary()}; {conversion.target} was "
            "not written; report this, with both checkpoints"
        )
    wanted = conversion.verify_logits
    if wanted is None:
        wanted = source.config.num_parameters < MAX_PARAMETERS_FOR_LOGITS
    if wanted:
        from ascendspeed_ckpt.logits import compare_logits

        as_transformers = folder if conversion.to == "huggingface" else None
        difference, largest, who = compare_logits(source, written, as_transformers)
        exact = conversion.dtype is None
        if exact and not difference <= LOGITS_TOLERANCE * max(largest, 1.0):
            raise AscendSpeedError(
                f"{who} computes other logits from the written checkpoint (difference {difference:.2e}, largest "
                f"logit {largest:.2f}); {conversion.target} was not written"
            )
        checked.append(
            f"logits: largest difference between ours on the input and {who} on the output {difference:.2e} "
            f"(largest logit {largest:.2f})"
        )
    return comparison, tuple(checked)


def _flush(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _replaced(target: Path) -> Path:
    return target.with_name(f"{target.name}.replaced{INCOMPLETE}")


def _rename(scratch: Path, target: Path) -> None:
    """Give a complete folder its final name; an older one stays until then."""
    old = _replaced(target)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    shutil.rmtree(old, ignore_errors=True)
