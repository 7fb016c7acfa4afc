"""Convert a checkpoint to another kind, and prove the result before it gets its name."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ascendspeed_ckpt.compare import Comparison, compare
from ascendspeed_core.weights import WeightSource, open_weights
from ascendspeed_core.weights.open import kind_of
from ascendspeed_core.weights.write_huggingface import write_hugging_face
from ascendspeed_core.weights.write_native import write_native
from ascendspeed_data.command_line import Progress, log
from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.lock import output_lock
from ascendspeed_data.tokenizer import copy_tokenizer

Kind = Literal["huggingface", "native"]
MAX_PARAMETERS_FOR_LOGITS = 1_000_000_000
LOGITS_TOLERANCE = 1e-4
"""Largest accepted difference of fp32 logits: the same sums, in the order of two libraries."""


@dataclass(frozen=True)
class Conversion:
    """What to convert.

    Attributes:
        source: checkpoint to read, of any kind that is recognised.
        target: folder to write.
        to: kind of the target.
        dtype: format of the written weights, or `None` for the stored one.
        tokenizer: folder whose tokenizer goes along, or `None` for the one that came with the source.
        max_shard_bytes: weights in one file of a Hugging Face folder.
        verify_logits: run both models on the CPU; `None` does so below a billion parameters.
        overwrite: replace a target that exists.
    """

    source: Path
    target: Path
    to: Kind
    dtype: torch.dtype | None = None
    tokenizer: Path | None = None
    max_shard_bytes: int = 5_000_000_000
    verify_logits: bool | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a conversion proved.

    Attributes:
        num_tensors: tensors of the logical model, each read once and written once.
        num_bytes: weights written.
        seconds: from the first read to the rename, verification left out.
        comparison: every tensor read back and compared with the source after the change of format.
        logits_difference: largest difference of logits between our model and transformers, if both were run.
        largest_logit: to see the difference in proportion.
    """

    num_tensors: int
    num_bytes: int
    seconds: float
    comparison: Comparison
    logits_difference: float | None = None
    largest_logit: float | None = None


def convert(conversion: Conversion) -> Verdict:
    """Write the target under a temporary name, prove it equal to the source, and rename it.

    Raises:
        AscendSpeedError: the source cannot be read, the target exists, or the result is not equal.
    """
    source = open_weights(conversion.source)
    target = conversion.target
    if target.exists() and not conversion.overwrite:
        raise AscendSpeedError(
            f"output_model_dir={target} exists; give --overwrite to replace it, or another folder"
        )
    scratch = target.with_name(f"{target.name}.incomplete")
    lock = target.with_name(f"{target.name}.lock")
    with output_lock(lock, f"--output-model-dir {target}"):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        started = time.perf_counter()
        num_bytes = _write(conversion, source, scratch)
        _carry_tokenizer(conversion, source, scratch)
        _to_disk(scratch)
        seconds = time.perf_counter() - started
        verdict = _verify(conversion, source, scratch, num_bytes, seconds)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    return verdict


def total_bytes(source: WeightSource, dtype: torch.dtype | None) -> int:
    """Return the size of all weights in a format."""
    return sum(
        info.num_bytes // info.dtype.itemsize * (dtype or info.dtype).itemsize
        for info in source.tensors().values()
    )


def _write(conversion: Conversion, source: WeightSource, folder: Path) -> int:
    total = total_bytes(source, conversion.dtype)
    with Progress("writing", total, "bytes") as bar:
        on_bytes: Callable[[int], None] = bar.advance
        if conversion.to == "huggingface":
            write_hugging_face(source, folder, conversion.dtype, conversion.max_shard_bytes, on_bytes)
        else:
            write_native(source, folder, conversion.dtype, on_bytes)
    return total


def _carry_tokenizer(conversion: Conversion, source: WeightSource, folder: Path) -> None:
    tokenizer = conversion.tokenizer or source.tokenizer
    if tokenizer is None:
        log(f"{conversion.source} came without a tokenizer and none was given: {conversion.target} has none")
        return
    place = folder if conversion.to == "huggingface" else folder / "tokenizer"
    if not copy_tokenizer(tokenizer, place):
        raise AscendSpeedError(
            f"tokenizer {tokenizer} holds no tokenizer file; check --tokenizer-name-or-path"
        )


def _verify(
    conversion: Conversion, source: WeightSource, folder: Path, num_bytes: int, seconds: float
) -> Verdict:
    written = open_weights(folder)
    comparison = compare(source, written, conversion.dtype)
    if not comparison.equal:
        raise AscendSpeedError(
            f"the written checkpoint differs from {conversion.source}: {comparison.summary()}; {conversion.target} was "
            "not made, report this with both"
        )
    wanted = conversion.verify_logits
    if wanted is None:
        wanted = source.config.num_parameters < MAX_PARAMETERS_FOR_LOGITS
    difference = largest = None
    if conversion.to == "huggingface" and wanted:
        from ascendspeed_ckpt.logits import compare_logits

        difference, largest = compare_logits(written, folder)
        if not difference <= LOGITS_TOLERANCE * max(largest, 1.0):
            raise AscendSpeedError(
                f"transformers computes other logits from the written checkpoint (difference {difference:.2e}, largest "
                f"logit {largest:.2f}); {conversion.target} was not made"
            )
    return Verdict(comparison.num_tensors, num_bytes, seconds, comparison, difference, largest)


def _to_disk(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def other_kind(source: Path) -> Kind:
    """Return what a checkpoint is converted to unless told otherwise."""
    return "native" if kind_of(source) == "huggingface" else "huggingface"
