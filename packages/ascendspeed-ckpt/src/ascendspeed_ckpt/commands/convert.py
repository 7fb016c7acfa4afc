"""`asd-ckpt convert`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import ConfigError


def convert_command(
    input_model_dir: Annotated[
        Path, typer.Option("--input-model-dir", "--load", help="Checkpoint to read; its kind is recognised.")
    ],
    output_model_dir: Annotated[Path, typer.Option("--output-model-dir", "--save", help="Folder to write.")],
    to: Annotated[
        Literal["huggingface", "native"] | None,
        typer.Option(help="Kind to write. [default: native from huggingface, huggingface from native]"),
    ] = None,
    dtype: Annotated[
        Literal["float64", "float32", "bfloat16", "float16"] | None,
        typer.Option(help="Format of the written weights. [default: as stored]"),
    ] = None,
    tokenizer_name_or_path: Annotated[
        Path | None, typer.Option(help="Tokenizer that goes along. [default: the source's own]")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Weights in one file, such as 500MB or 5GB.")] = "5GB",
    verify_logits: Annotated[
        bool | None,
        typer.Option(
            "--verify-logits/--no-verify-logits",
            help="Run our model and transformers on the result. [default: below a billion parameters]",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, write nothing.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder that exists.")] = False,
) -> None:
    """Convert a checkpoint, streaming, and prove the result equal before it gets its name."""
    max_shard_bytes = parse_size(max_shard_size)
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    import torch

    from ascendspeed_ckpt.convert import Conversion, convert, other_kind, total_bytes
    from ascendspeed_core.weights import open_weights

    wanted = getattr(torch, dtype) if dtype else None
    conversion = Conversion(
        source=input_model_dir,
        target=output_model_dir,
        to=to or other_kind(input_model_dir),
        dtype=wanted,
        tokenizer=tokenizer_name_or_path,
        max_shard_bytes=max_shard_bytes,
        verify_logits=verify_logits,
        overwrite=overwrite,
    )
    source = open_weights(input_model_dir)
    tensors = source.tensors()
    log(
        f"{source.kind} {input_model_dir} -> {conversion.to} {output_model_dir}: {len(tensors)} tensors, "
        f"{total_bytes(source, wanted):,} bytes, at most {max(t.num_bytes for t in tensors.values()):,} bytes at once"
    )
    if dry_run:
        return
    report(convert(conversion))


def report(verdict: Any) -> None:
    """Print what was proved."""
    rate = verdict.num_bytes / max(verdict.seconds, 1e-9) / 1e6
    print(f"written: {verdict.num_bytes:,} bytes in {verdict.seconds:.2f} s ({rate:,.0f} MB/s)")
    print(f"tensors: {verdict.num_tensors}, each read back and equal to the source bit for bit")
    if verdict.logits_difference is not None:
        print(
            f"logits: largest difference between ours and transformers {verdict.logits_difference:.2e} "
            f"(largest logit {verdict.largest_logit:.2f})"
        )
    print("verdict: the same model")


def parse_size(text: str) -> int:
    """Return bytes from `5GB`, `500MB`, `1000KB` or a plain number (powers of ten)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"max_shard_size={text!r} is no size; write for example 500MB or 5GB")
    return size
