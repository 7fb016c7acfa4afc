"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_ckpt.config import SourceKind

Folder = Annotated[Path, typer.Argument(help="Checkpoint folder, of any kind.")]
FromKind = Annotated[
    SourceKind | None, typer.Option("--from", help="Kind of the checkpoint. [default: detected]")
]
ModelConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--model-config", help="config.json of the model, for external checkpoints that do not include one."
    ),
]
OrigVocabSize = Annotated[
    int | None,
    typer.Option(
        "--orig-vocab-size",
        min=1,
        help="Vocabulary size without padding, for checkpoints that do not record it.",
    ),
]
