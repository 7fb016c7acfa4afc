"""`asd-core profile-device`."""

import sys
import time
from typing import Any

from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.planning import DeviceProfilingConfig
from ascendspeed_data.command_line import log
from ascendspeed_data.command_line.options import options_from


@options_from(DeviceProfilingConfig)
def profile_device(**given: Any) -> None:
    """Measure this device, and write a profile for `asd-core plan --device FILE`.

    Matrix products by size and format, operators over memory, attention; with several processes (--nproc-per-node, or
    under torchrun) all of them at the same time, and collectives by size.
    """
    config = load_config(DeviceProfilingConfig, None, given)
    from ascendspeed_core.launch import is_worker, launch, planned_world_size, process_group, worker_errors

    world_size = planned_world_size(config.launch.nproc_per_node)
    with worker_errors():
        from ascendspeed_core.device import prepare_torch

        prepare_torch(config.launch.device)
        if world_size > 1 and not is_worker():
            log(f"measuring for about {config.profile.budget_seconds:.0f} s with {world_size} processes")
            launch("ascendspeed_core.cli", sys.argv[1:], config.launch.nproc_per_node, config.launch.device)
            return
        from ascendspeed_core.planner.profile_device import profile_device as measure
        from ascendspeed_core.planner.profile_device import profile_text

        started = time.perf_counter()
        with process_group(config.launch.device) as (world, device):
            content = measure(config.profile, device, world.size)
            if world.rank == 0:
                config.profile.output.write_text(profile_text(content), encoding="utf-8")
                found = ", ".join(
                    f"{len(content[kind])} {kind}" for kind in ("products", "operators", "collectives")
                )
                log(f"{config.profile.output}: {found}, measured in {time.perf_counter() - started:.0f} s")
