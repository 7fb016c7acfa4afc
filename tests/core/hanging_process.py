"""A process of several that hangs on purpose; started as a module by `test_watchdog.py`."""

import sys
import time

import torch
import torch.distributed as dist

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.launch import process_group
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.observability.watchdog import Watchdog
from ascendspeed_core.parallel.mesh import ParallelMesh
from support.models import tiny_config


def read_from_a_dead_disk() -> None:
    time.sleep(60)


def main(which: str) -> None:
    """Hang in rank 1, on a disk or waiting for another rank."""
    with process_group("cpu") as (world, _):
        model = Transformer(tiny_config(num_layers=1))
        watchdog = Watchdog(ParallelMesh.create(Device("cpu"), Layout(dp=world.size)), 1.0, model)
        try:
            with watchdog.watching(7, "step"):
                if world.rank == 1 and which == "disk":
                    read_from_a_dead_disk()
                if world.rank == 1:
                    # A message that nobody sends.
                    dist.recv(torch.empty(1), src=0)
                dist.barrier()
        finally:
            watchdog.stop()


if __name__ == "__main__":
    main(sys.argv[1])
