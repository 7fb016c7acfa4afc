"""`asd-ckpt convert`."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ascendspeed_ckpt.config import EXTERNAL_KINDS, ConvertOptions, OutputOptions, TargetKind
from ascendspeed_core.config.load import load_config
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from
from ascendspeed_data.command_line.stopping import keeping
from ascendspeed_data.errors import AscendSpeedError, ConfigError

if TYPE_CHECKING:
    from ascendspeed_ckpt.conversion import Conversion, Verdict
    from ascendspeed_core.weights import WeightSource


@options_from(ConvertOptions)
def convert_command(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and write nothing.")
    ] = False,
    **given: Any,
) -> None:
    """Convert a checkpoint to another kind or layout, and prove the result equal before the folder gets its name."""
    options = load_config(ConvertOptions, None, given)
    max_shard_bytes = parse_size(options.output.max_shard_size)
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    source = open_input(options)
    run(plan(options, source, max_shard_bytes), dry_run)


def open_input(options: ConvertOptions) -> "WeightSource":
    """Open the input as the options describe it, with the changes that they ask for."""
    from ascendspeed_ckpt.model_sizes import check_description, config_of_type
    from ascendspeed_ckpt.resize_vocab import ResizedVocabulary
    from ascendspeed_core.weights import open_weights
    from ascendspeed_core.weights.huggingface.config import read_model_config
    from ascendspeed_data.tokenizer import load_tokenizer

    given = options.input
    config = read_model_config(given.model_config_file) if given.model_config_file is not None else None
    source = open_weights(
        given.input_model_dir, given.from_kind, config, given.orig_vocab_size, lambda: config_of_type(given)
    )
    check_description(given, source.config, source.layout)
    change = options.change
    if change.resize_vocab_to is not None:
        tokenizer = load_tokenizer(change.resize_vocab_to)
        size = tokenizer.vocab_size
        log(f"vocabulary: {source.config.vocab_size:,} -> {size:,} ids, as {change.resize_vocab_to} has")
        return ResizedVocabulary(source, size, tokenizer)
    if change.added_token_num:
        return ResizedVocabulary(source, source.config.vocab_size + change.added_token_num)
    return source


def plan(
    options: ConvertOptions, source: "WeightSource", max_shard_bytes: int, default: TargetKind | None = None
) -> "Conversion":
    """Return the conversion that the options describe; without `--to` the result is of the kind `default`."""
    import torch

    from ascendspeed_ckpt.conversion import Conversion

    output, work = options.output, options.work
    to = output.to or default or default_target(options, source)
    dtype = getattr(torch, output.dtype) if output.dtype else None
    return Conversion(
        source=source,
        target=output.output_model_dir,
        to=to,
        dtype=dtype,
        tokenizer=output.tokenizer_name_or_path,
        max_shard_bytes=max_shard_bytes,
        pickled=output.weights_format == "bin",
        write_plan=make_write_plan(output, to, source.config.num_layers, dtype)
        if to in EXTERNAL_KINDS
        else None,
        verify_logits=work.verify_logits,
        workers=work.workers,
        overwrite=work.overwrite,
    )


def default_target(options: ConvertOptions, source: "WeightSource") -> TargetKind:
    """Return the kind to write when `--to` is not given."""
    if options.output.has_layout:
        return "megatron" if source.kind == "megatron" else "ascendspeed"
    return "native" if source.kind == "huggingface" else "huggingface"


def make_write_plan(output: OutputOptions, to: TargetKind, num_layers: int, dtype: Any) -> Any:
    """Return layout and names of an external checkpoint."""
    from ascendspeed_ckpt.writers.write_plan import WritePlan
    from ascendspeed_core.weights.shard_layout import shard_layout

    layout = shard_layout(
        num_layers,
        output.tensor_model_parallel_size or 1,
        output.pipeline_model_parallel_size or 1,
        output.num_layers_per_virtual_pipeline_stage,
        output.stage_sizes(),
        output.expert_model_parallel_size or 1,
    )
    return WritePlan(
        to,  # type: ignore[arg-type]
        layout,
        dtype,
        output.make_vocab_size_divisible_by,
        output.merge_mlp,
        output.megatron_layers == "transformer_engine",
    )


def run(conversion: "Conversion", dry_run: bool) -> None:
    """Log what will be done, do it, and print what was proved."""
    from ascendspeed_ckpt.conversion import (
        convert,
        is_taken,
        memory_bytes,
        not_converted,
        total_bytes,
        what_is_kept,
    )
    from ascendspeed_core.weights import WeightSource

    source = conversion.source
    assert not isinstance(source, Path)
    opened: WeightSource = source
    dtypes = sorted({str(info.dtype).removeprefix("torch.") for info in opened.tensors().values()})
    kept = str(conversion.dtype).removeprefix("torch.") if conversion.dtype else ", ".join(dtypes)
    layout = f" ({opened.layout})" if opened.layout is not None else ""
    log(f"read: {opened.kind} {opened.path}{layout}, {len(opened.tensors())} tensors, {', '.join(dtypes)}")
    cut = f", {conversion.write_plan.layout}" if conversion.write_plan else ""
    total = total_bytes(opened, conversion.dtype, conversion.write_plan)
    log(f"write: {conversion.to} {conversion.target}{cut}, {total:,} bytes, {kept}")
    if conversion.write_plan is not None:
        rows = conversion.write_plan.vocabulary_rows(opened.config)
        conversion.write_plan.name_map(opened.config)
        log(
            f"vocabulary: {opened.config.vocab_size:,} ids, padded to {rows:,} rows by repeating the last one"
        )
    for what in not_converted(opened, conversion):
        log(
            f"not converted: {what}, which a {conversion.to} checkpoint cannot hold, or which fits the old layout only"
        )
    workers = conversion.num_workers
    log(
        f"memory: at most {memory_bytes(opened, workers):,} bytes of tensors at once, {workers} files at once"
    )
    if dry_run:
        if is_taken(conversion.target) and not conversion.overwrite:
            raise AscendSpeedError(
                f"output_model_dir={conversion.target} exists; give --overwrite to replace it"
            )
        return
    with keeping(partial(what_is_kept, conversion.target, is_taken(conversion.target))):
        report(convert(conversion), conversion)


def report(verdict: "Verdict", conversion: "Conversion") -> None:
    """Print what was proved."""
    rate = verdict.num_bytes / max(verdict.seconds, 1e-9) / 1e6
    print(
        f"written: {verdict.num_bytes:,} bytes in {verdict.seconds:.2f} s ({rate:,.0f} MB/s), "
        f"{verdict.flush_seconds:.2f} s of it to the disk; checked in {verdict.check_seconds:.2f} s"
    )
    as_dtype = f" as {str(conversion.dtype).removeprefix('torch.')}" if conversion.dtype else ""
    print(
        f"tensors: {verdict.num_tensors} ({verdict.num_compared_bytes:,} bytes), each used once, read back and equal "
        f"to the source bit for bit{as_dtype}"
    )
    for left in verdict.left_out:
        print(f"left out of the input: {left}")
    for what in verdict.not_converted:
        print(f"not converted, not compared: {what}")
    for line in verdict.checked:
        print(line)
    print(f"verdict: {conversion.target} holds the same model as {what_was_read(conversion)}")


def what_was_read(conversion: "Conversion") -> str:
    """Name the input with all changes that were made as it was read: what the output was compared with."""
    from ascendspeed_ckpt.resize_vocab import ResizedVocabulary
    from ascendspeed_core.weights import stored_source
    from ascendspeed_core.weights.adapters.merge import MergedAdapter

    source: Any = conversion.source
    changes = []
    if isinstance(source, MergedAdapter):
        changes.append(f"with the adapter {source.adapter.folder} merged into it")
        source = source.base
    while not isinstance(source, ResizedVocabulary) and source.base is not None:
        source = source.base
    if isinstance(source, ResizedVocabulary):
        changes.insert(0, f"with a vocabulary of {source.config.vocab_size:,} ids")
    if conversion.dtype is not None:
        changes.append(f"rounded to {str(conversion.dtype).removeprefix('torch.')}")
    return ", ".join([str(stored_source(conversion.source).path), *changes])  # type: ignore[arg-type]


def parse_size(text: str) -> int:
    """Return bytes from `5GB`, `500MB`, `1000KB` or a plain number (powers of ten)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"max_shard_size={text!r} is not a size; write for example 500MB or 5GB")
    return size
