"""Build the sample index of a run in a process of its own.

megatron-core writes the index in the first process of a run and reads it in all others. A machine whose cache folder
is not that of the first process builds its own with this module, which is one process and so the first.
"""

import json
import sys


def main() -> None:
    """Build what stdin describes."""
    from ascendspeed_core.config.layout import Layout
    from ascendspeed_core.config.training import DataConfig
    from ascendspeed_core.device import HOST, prepare_torch

    prepare_torch(HOST.kind)
    from ascendspeed_core.data.gpt_dataset import GPTBatchLoader
    from ascendspeed_core.parallel.mesh import ParallelMesh

    wanted = json.loads(sys.stdin.read())
    config = DataConfig.model_validate(wanted.pop("config"))
    GPTBatchLoader(config, mesh=ParallelMesh(HOST, Layout()), **wanted)


if __name__ == "__main__":
    main()
