"""`asd-core compare-loss`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError


def compare_loss(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs; the others are compared with the first.")
    ],
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest accepted relative deviation of a loss; more ends with status 1."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw the curves into.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per run.")] = False,
) -> None:
    """Compare the losses of runs iteration by iteration, from their metrics.jsonl."""
    if len(runs) < 2:
        raise ConfigError(f"{len(runs)} run given; give the one to compare with and at least one other")
    from ascendspeed_core.verification.compare_loss import compare_losses, draw_comparison, losses_of

    losses = [losses_of(run) for run in runs]
    found = [compare_losses(losses[0], other, run) for run, other in zip(runs[1:], losses[1:], strict=True)]
    for row in found:
        if as_json:
            print(json.dumps(asdict(row) | {"run": str(row.run)}))
            continue
        print(
            f"{row.run}: {row.num_iterations} iterations, largest relative deviation {row.largest:.2e} (iteration "
            f"{row.at_iteration}), mean {row.mean:.2e}"
        )
        print(row.verdict(runs[0]))
        if row.only_in_one:
            log(f"{row.run}: {row.only_in_one} iterations are in one of the two runs only")
    if picture is not None:
        draw_comparison([(str(run), values) for run, values in zip(runs, losses, strict=True)], picture)
        log(f"wrote {picture}")
    if tolerance is None:
        return
    beyond = [row for row in found if not row.within(tolerance)]
    if beyond:
        worst = max(beyond, key=lambda row: row.largest)
        raise AscendSpeedError(
            f"{worst.run} deviates by {worst.largest:.2e} at iteration {worst.at_iteration}, more than "
            f"tolerance={tolerance}"
        )
    log(f"all within tolerance={tolerance}")
