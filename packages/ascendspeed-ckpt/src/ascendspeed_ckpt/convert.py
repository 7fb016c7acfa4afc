"""Convert a checkpoint to another kind, and prove the result before it gets its name."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascendspeed_ckpt.compare import Comparison, compare
from ascendspeed_ckpt.config import SHARDED, TargetKind
from ascendspeed_ckpt.sources import ResizedVocabulary
from ascendspeed_core.weights import NativeSource, WeightSource, open_weights
from ascendspeed_core.weights.adapters.files import MergedAdapter
from ascendspeed_core.weights.detect import kind_of
from ascendspeed_core.weights.external.torch_dist import write_torch_dist
from ascendspeed_core.weights.external.write_mp_rank import write_sharded
from ascendspeed_core.weights.external.write_plan import WritePlan
from ascendspeed_core.weights.huggingface.write import write_hugging_face
from ascendspeed_core.weights.native.write import write_native
from ascendspeed_core.weights.stream import SLAB_BYTES
from ascendspeed_data.command_line import Progress, log
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.files import INCOMPLETE
from ascendspeed_data.lock import output_lock
from ascendspeed_data.tokenizer import copy_tokenizer

MAX_PARAMETERS_FOR_LOGITS = 1_000_000_000
LOGITS_TOLERANCE = 1e-4
"""Largest accepted difference of fp32 logits: the same sums, in the order of two libraries."""

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Conversion:
    """What to convert.

    Attributes:
        source: checkpoint to read, of any kind that is recognised, or one that is open.
        target: folder to write.
        to: kind of the target.
        dtype: format of the written weights, or `None` for the stored one.
        tokenizer: folder whose tokenizer goes along, or `None` for the one that came with the source.
        max_shard_bytes: weights in one file of a Hugging Face folder.
        pickled: `.bin` files instead of safetensors in a Hugging Face folder.
        foreign: layout and naming of a target of another system.
        verify_logits: run both models on the CPU; `None` does so below a billion parameters.
        workers: files written at once; `None` is one per core.
        overwrite: replace a target that exists.
    """

    source: Path | WeightSource
    target: Path
    to: TargetKind
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    max_shard_bytes: int = 5_000_000_000
    pickled: bool = False
    foreign: WritePlan | None = None
    verify_logits: bool | None = None
    workers: int | None = None
    overwrite: bool = False

    @property
    def num_workers(self) -> int:
        """Files written at once."""
        return self.workers or min(len(os.sched_getaffinity(0)), 8)


@dataclass(frozen=True)
class Verdict:
    """What a conversion proved.

    Attributes:
        num_tensors: tensors of the logical model, each read once and written once.
        num_bytes: bytes of tensors written, with copies and filling.
        seconds: from the first read to the rename, with flushing to the disk; checks left out.
        flush_seconds: of these, bringing the bytes to the disk.
        check_seconds: checksums of the source, comparison of all tensors, logits.
        comparison: every tensor read back and compared with the source after the change of format.
        checked: what else was proved, in words.
        left_behind: what the source holds and the target does not.
    """

    num_tensors: int
    num_bytes: int
    seconds: float
    flush_seconds: float
    check_seconds: float
    comparison: Comparison
    checked: tuple[str, ...]
    left_behind: tuple[str, ...]


def convert(conversion: Conversion) -> Verdict:
    """Write the target under a temporary name, prove it equal to the source, and rename it.

    Raises:
        AscendSpeedError: the source cannot be read, the target exists, or the result is not equal.
    """
    source = conversion.source
    if isinstance(source, Path):
        source = open_weights(source)
    target = conversion.target
    _check_places(conversion, source)
    scratch = target.with_name(f"{target.name}{INCOMPLETE}")
    lock = target.with_name(f"{target.name}.lock")
    with output_lock(lock, f"--output-model-dir {target}"):
        shutil.rmtree(scratch, ignore_errors=True)
        _check_space(conversion, source)
        scratch.mkdir(parents=True)
        started = time.perf_counter()
        num_bytes = _write(conversion, source, scratch)
        _carry_texts(conversion, source, scratch)
        written = time.perf_counter()
        _to_disk(scratch)
        flushed = time.perf_counter()
        comparison, checked = _verify(conversion, source, scratch)
        check_seconds = time.perf_counter() - flushed
        _rename(scratch, target)
    return Verdict(
        comparison.num_tensors,
        num_bytes,
        flushed - started,
        flushed - written,
        check_seconds,
        comparison,
        checked,
        tuple(left_behind(source, conversion)),
    )


def total_bytes(source: WeightSource, dtype: torch.dtype | None, foreign: WritePlan | None = None) -> int:
    """Return the bytes of all tensors that are written; formats of other systems hold copies and filling."""
    stored = source.tensors()
    if foreign is not None and foreign.kind in SHARDED:
        return sum(
            foreign.info(packed, stored).num_bytes
            for _, chunks in foreign.plan(source)
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


def left_behind(source: WeightSource, conversion: Conversion) -> list[str]:
    """Name what the source holds beside the weights and the target has no place for."""
    stored = as_stored(source)
    if isinstance(stored, NativeSource):
        if _moves_training_state(source, conversion):
            return []
        return sorted({name.partition("/")[0] for name in stored.stored.names()} - {"model"})
    named: list[str] = getattr(stored, "left_behind", list)()
    return named


def as_stored(source: WeightSource) -> WeightSource:
    """Return the checkpoint itself, without the changes that are made on the way."""
    while isinstance(source, MergedAdapter | ResizedVocabulary):
        source = source.base
    return source


def other_kind(source: Path) -> TargetKind:
    """Return what a checkpoint is converted to unless told otherwise."""
    return "native" if kind_of(source) == "huggingface" else "huggingface"


def _moves_training_state(source: WeightSource, conversion: Conversion) -> bool:
    """Tell whether optimizer state goes along: between native checkpoints whose weights stay as they are."""
    return isinstance(source, NativeSource) and conversion.to == "native" and conversion.dtype is None


def _check_places(conversion: Conversion, source: WeightSource) -> None:
    target = conversion.target
    if target.exists() and not conversion.overwrite:
        raise AscendSpeedError(
            f"output_model_dir={target} exists; give --overwrite to replace it, or another folder"
        )
    if source.path is not None:
        place, real = source.path.resolve(), target.resolve()
        if real == place or real in place.parents or place in real.parents:
            raise AscendSpeedError(
                f"output_model_dir={target} and the input {source.path} lie in one another; choose another folder"
            )


def _check_space(conversion: Conversion, source: WeightSource) -> None:
    parent = next(folder for folder in conversion.target.resolve().parents if folder.is_dir())
    needed, free = total_bytes(source, conversion.dtype, conversion.foreign), shutil.disk_usage(parent).free
    if needed > free:
        raise AscendSpeedError(
            f"{parent} has {free:,} bytes free, {conversion.target} needs {needed:,}; make room or choose another disk"
        )


def _write(conversion: Conversion, source: WeightSource, folder: Path) -> int:
    total = total_bytes(source, conversion.dtype, conversion.foreign)
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
            assert conversion.foreign is not None
            write: Any = write_sharded if conversion.to in SHARDED else write_torch_dist
            write(source, folder, conversion.foreign, workers, on_bytes)
    return total


def _carry_texts(conversion: Conversion, source: WeightSource, folder: Path) -> None:
    """Carry along tokenizer and generation config."""
    tokenizer = conversion.tokenizer or source.tokenizer
    place = folder if conversion.to == "huggingface" else folder / "tokenizer"
    if tokenizer is None:
        log(f"{source.path} came without a tokenizer and none was given: {conversion.target} has none")
    elif not copy_tokenizer(tokenizer, place):
        raise AscendSpeedError(
            f"tokenizer {tokenizer} holds no tokenizer file; check --tokenizer-name-or-path"
        )
    if source.path is not None and (source.path / GENERATION).is_file():
        shutil.copyfile(source.path / GENERATION, folder / GENERATION)


def _verify(conversion: Conversion, source: WeightSource, folder: Path) -> tuple[Comparison, tuple[str, ...]]:
    """Prove source and target sound and equal.

    Raises:
        AscendSpeedError: they are not.
    """
    checked = []
    written = open_weights(folder, conversion.to)
    for what, opened in (("input", as_stored(source)), ("output", written)):
        check: Callable[[], None] | None = getattr(opened, "check", None)
        if check is not None:
            check()
            checked.append(f"checksums of the {what} are right")
    comparison = compare(source, written, conversion.dtype, workers=conversion.num_workers)
    if not comparison.equal:
        raise AscendSpeedError(
            f"the written checkpoint differs from {source.path}: {comparison.summary()}; {conversion.target} was "
            "not made, report this with both"
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
                f"logit {largest:.2f}); {conversion.target} was not made"
            )
        checked.append(
            f"logits: largest difference between ours on the input and {who} on the output {difference:.2e} "
            f"(largest logit {largest:.2f})"
        )
    return comparison, tuple(checked)


def _to_disk(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _rename(scratch: Path, target: Path) -> None:
    """Put a complete folder in its place; what was there is there until the new one is."""
    old = target.with_name(f"{target.name}.replaced{INCOMPLETE}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    scratch.rename(target)
    shutil.rmtree(old, ignore_errors=True)
