"""Build the sample index of a run in a process of its own.

megatron-core writes the index in the first process of a run and reads it in all others. A machine whose cache folder
is not that of the first process builds its own with this module, which is one process and so the first.
"""

import json
import os
import subprocess
import sys
from typing import Any

from ascendspeed_data.errors import DataError


def build_index_alone(**arguments: Any) -> None:
    """Start a process that builds the index, and wait for it.

    Args:
        **arguments: those of `GPTData` but `mesh`.

    Raises:
        DataError: it failed; the message is its own.
    """
    clean = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    wanted = arguments | {"config": arguments["config"].model_dump(mode="json")}
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(wanted),
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise DataError(f"the sample index could not be built on this machine: {lines[-1]}")


def main() -> None:
    """Build what stdin describes."""
    from ascendspeed_core.config.parallel import Layout
    from ascendspeed_core.config.training import DataConfig
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_core.data.gpt_dataset import GPTData
    from ascendspeed_core.parallel.mesh import ParallelMesh

    wanted = json.loads(sys.stdin.read())
    config = DataConfig.model_validate(wanted.pop("config"))
    GPTData(config, mesh=ParallelMesh(HOST, Layout()), **wanted)


if __name__ == "__main__":
    main()
