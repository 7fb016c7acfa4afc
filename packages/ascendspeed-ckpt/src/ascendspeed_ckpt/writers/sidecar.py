"""Write `ascendspeed.json` beside an external checkpoint."""

import json
from pathlib import Path

from ascendspeed_core.weights.external.sidecar import FORMAT_VERSION, SIDECAR, Sidecar
from ascendspeed_data.files import write_durably


def write_sidecar(sidecar: Sidecar, folder: Path) -> None:
    """Write the sidecar; it is the last file of a checkpoint."""
    content = {
        "format_version": FORMAT_VERSION,
        "kind": sidecar.kind,
        "layout": sidecar.layout,
        "vocabulary_rows": sidecar.vocabulary_rows,
        "checkpoint": sidecar.checkpoint,
        "model": sidecar.model.model_dump(mode="json"),
        "checksums": sidecar.checksums,
    }
    write_durably(folder / SIDECAR, json.dumps(content, indent=1) + "\n")
