"""`asd-core parity`."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_core.device import DeviceChoice
from ascendspeed_data.errors import AscendSpeedError, ConfigError


def parity(
    data_path: Annotated[list[str], typer.Option(help="Prefix of a .bin/.idx pair, or a blend.")],
    layouts: Annotated[
        str | None,
        typer.Option(
            help="What to compare with one process: tp2,pp2,tp2pp2dp2+sp,pp2+zbv,1+full+triangle. "
            "[default: 1, with --engines]"
        ),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(help="Train each layout under these: ascendspeed,deepspeed,megatron."),
    ] = None,
    load: Annotated[Path | None, typer.Option(help="Checkpoint to start from.")] = None,
    model_config_file: Annotated[
        Path | None,
        typer.Option("--model-config-file", "--model-config", help="Random weights of this config.json."),
    ] = None,
    seq_length: Annotated[int, typer.Option(min=1, help="Tokens of one sample.")] = 128,
    reset_attention_mask: Annotated[
        bool, typer.Option("--reset-attention-mask", help="Attention stays inside a document.")
    ] = False,
    reset_position_ids: Annotated[
        bool, typer.Option("--reset-position-ids", help="Positions begin at 0 again in each document.")
    ] = False,
    eod_mask_loss: Annotated[
        bool, typer.Option("--eod-mask-loss", help="Leave the loss at end-of-document tokens out.")
    ] = False,
    tokenizer_name_or_path: Annotated[
        Path | None, typer.Option(help="Tokenizer of data without a manifest, which ends its documents.")
    ] = None,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="Samples of one forward pass.")] = 1,
    global_batch_size: Annotated[int, typer.Option(min=1, help="Samples of one step.")] = 8,
    train_iters: Annotated[int, typer.Option(min=1, help="Steps.")] = 5,
    lr: Annotated[float, typer.Option(min=0, help="Highest learning rate.")] = 1e-4,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float64 shows real differences; narrower formats blur them. [default: float64; float32 with "
            "--engines, of which some keep no more]"
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest accepted relative deviation. [default: by --dtype]")
    ] = None,
    device: Annotated[DeviceChoice, typer.Option(help="Device of all runs.")] = "auto",
) -> None:
    """Train your model on your data for a few steps under several layouts, and compare them with one process.

    A layout is tp, pp and dp with their sizes, or 1 for one process. Features stand behind it, each after a plus: sp,
    sharded, gpipe, zbv, dualpipev, vppN, vppN-zb, aiao, fifo, full, selective, attention, blockN, triangle, reference,
    mlp-fusion, mbsN-N. With --engines each layout is trained under each of them and compared with one process of this
    project's; what an engine refuses is said below the table. Ends with status 1 when a layout deviates. Nothing is
    kept.
    """
    if layouts is None and engines is None:
        raise ConfigError("neither of --layouts and --engines given; give --layouts tp2,pp2, for example")
    if (load is None) == (model_config_file is None):
        raise ConfigError("give either --load DIR or --model-config FILE")
    from ascendspeed_core.device import prepare_torch

    prepare_torch(device)
    from ascendspeed_core.verification.parity import TOLERANCE, parse_layouts, run_parity, table, with_engines

    dtype = dtype or ("float32" if engines else "float64")
    if dtype not in TOLERANCE:
        raise ConfigError(f"dtype={dtype} is unknown; there are {', '.join(TOLERANCE)}")
    wanted = parse_layouts(layouts or "1")
    if engines is not None:
        wanted = with_engines(wanted, engines)
    for candidate in wanted:
        dp = candidate.sizes.get("dp", 1)
        if global_batch_size % (micro_batch_size * dp):
            raise ConfigError(
                f"global_batch_size={global_batch_size} is not a multiple of micro_batch_size x dp = "
                f"{micro_batch_size} x {dp} of {candidate.name}"
            )
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    source = ["--load", str(load), "--finetune"] if load else ["--model-config", str(model_config_file)]
    flags = {
        "--reset-attention-mask": reset_attention_mask,
        "--reset-position-ids": reset_position_ids,
        "--eod-mask-loss": eod_mask_loss,
    }
    source += [flag for flag, is_given in flags.items() if is_given]
    if tokenizer_name_or_path is not None:
        source += ["--tokenizer-name-or-path", str(tokenizer_name_or_path)]
    arguments = [
        *source, "--data-path", *data_path, "--split", "1,0,0", "--seq-length", seq_length, "--micro-batch-size",
        micro_batch_size, "--global-batch-size", global_batch_size, "--train-iters", train_iters, "--lr", lr, "--dtype",
        dtype,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ascendspeed-parity-") as scratch:
        rows = run_parity(wanted, [str(argument) for argument in arguments], Path(scratch), device)
    print("\n".join(table(rows, limit)))
    different = [row.name for row in rows if not row.within(limit)]
    if different:
        raise AscendSpeedError(
            f"{', '.join(different)} deviate by more than tolerance={limit} from one process"
        )
