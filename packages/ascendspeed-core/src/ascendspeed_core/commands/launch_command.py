"""`asd-core launch-command`."""

from pathlib import Path
from typing import Annotated

import typer

from ascendspeed_core.commands.launch_scripts import SCRIPTS, Job, Launcher
from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.load import validate
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.config.recipes import TABLE, find_recipe, read_recipe
from ascendspeed_core.device import USUAL_CLUSTER, ClusterDevice
from ascendspeed_data.command_line import log
from ascendspeed_data.errors import ConfigError


def launch_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a TOML file.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- FLAGS]", help="Flags of the run: -- --data-path DATA --save RUN."),
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines. [default: as many as the recipe needs]")
    ] = None,
    devices_per_node: Annotated[int, typer.Option(min=1, help="Devices of each machine.")] = 8,
    kind: Annotated[
        Launcher,
        typer.Option(
            help="torchrun: a line for each machine. slurm: a script for sbatch. kubernetes: a manifest of Kubeflow's "
            "TrainJob. ascend: a script for all machines of a hostfile, with HCCL's variables."
        ),
    ] = "torchrun",
    device: Annotated[ClusterDevice, typer.Option(help="Devices of the cluster.")] = USUAL_CLUSTER,
    hosts: Annotated[
        list[str] | None, typer.Option(help="Names or addresses of the machines, the first one's first.")
    ] = None,
    hostfile: Annotated[
        Path, typer.Option(help="For ascend: file with one machine a line, the same on all of them.")
    ] = Path("hostfile"),
    master_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Free port of the first machine.")
    ] = 29500,
    interface: Annotated[
        str | None, typer.Option(help="Network interface of all machines, where they have several: eth0.")
    ] = None,
    image: Annotated[
        str, typer.Option(help="For kubernetes: image with this package.")
    ] = "ascendspeed:latest",
    job_name: Annotated[str | None, typer.Option(help="Name of the job. [default: the recipe's]")] = None,
) -> None:
    """Print what starts a recipe on several machines: lines for torchrun, or a script or manifest for a cluster.

    Flags of the run follow two dashes. Nothing is started; the output goes to stdout, remarks to stderr.
    """
    sections = read_recipe(find_recipe(recipe))
    table = sections.get(TABLE, {})
    arguments = arguments or []
    if nodes is None:
        meant = int(table.get("devices", devices_per_node))
        nodes = -(-meant // devices_per_node)
        devices_per_node = min(devices_per_node, meant)
    world_size = nodes * devices_per_node
    _check_layout(sections, arguments, world_size)
    meant = table.get("devices")
    if meant not in (None, world_size):
        log(
            f"{recipe} is laid out for {meant} devices, this is {world_size}: dp changes, and with it the speed"
        )
    command = str(table.get("command", "pretrain"))
    name = job_name or Path(recipe).name.removesuffix(".toml")
    if not name.isprintable():
        raise ConfigError(f"job_name={name!r} has characters that cannot be printed; choose another")
    job = Job(
        name=name,
        words=(command, recipe, *arguments),
        nodes=nodes,
        devices_per_node=devices_per_node,
        device=device,
        hosts=tuple(hosts or ()),
        hostfile=hostfile,
        port=master_port,
        interface=interface,
        image=image,
    )
    print("\n".join(SCRIPTS[kind](job)))


def _check_layout(sections: dict[str, dict[str, object]], arguments: list[str], world_size: int) -> None:
    """Refuse a number of devices that the recipe cannot use, unless flags change its layout or batch."""
    names = {*ParallelConfig.model_fields, *BatchConfig.model_fields}
    given = {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in arguments if arg.startswith("--")}
    if given & names or "config" in given:
        log("flags change the recipe's layout or batch; the run itself checks them before it starts")
        return
    layout = validate(ParallelConfig, dict(sections.get("parallel", {}))).layout(world_size)
    try:
        validate(BatchConfig, dict(sections.get("batch", {}))).resolve_global_batch_size(layout.dp)
    except ValueError as error:
        raise ConfigError(str(error)) from None
