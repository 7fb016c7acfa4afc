"""What starts a run on several machines, as text: torchrun, Slurm, Kubernetes, machines of a hostfile."""

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ascendspeed_core.device import CLUSTERS, ClusterFacts
from ascendspeed_data.errors import ConfigError
from ascendspeed_data.small_files import read_text

Launcher = Literal["torchrun", "slurm", "kubernetes", "ascend"]
"""What starts the processes."""

SAVE_SECONDS = 600
"""Time to save after SIGTERM, before processes are killed."""


@dataclass(frozen=True)
class Job:
    """A run on a cluster.

    Attributes:
        name: of the job.
        words: command of `asd-core` and what follows it.
        nodes: machines.
        devices_per_node: processes on each.
        device: kind of its devices.
        hosts: names of the machines, if they are known.
        hostfile: file with these names.
        port: free on the first machine.
        interface: network interface, if it must be named.
        image: of containers.
    """

    name: str
    words: tuple[str, ...]
    nodes: int
    devices_per_node: int
    device: str
    hosts: tuple[str, ...]
    hostfile: Path
    port: int
    interface: str | None
    image: str

    @property
    def cluster(self) -> ClusterFacts:
        """What its kind of device needs."""
        return CLUSTERS[self.device]

    @property
    def environment(self) -> list[tuple[str, str]]:
        """Variables of all processes."""
        found = [*self.cluster.environment, ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_SECONDS))]
        if self.interface is not None:
            found += [(name, self.interface) for name in self.cluster.interface]
        return found

    def torchrun(self, rank: str, address: str) -> str:
        """Return torchrun's line for one machine, for a shell.

        Args:
            rank: of the machine, as the shell reads it.
            address: of the first machine, as the shell reads it.
        """
        where = (
            f"--nnodes {self.nodes} --node-rank {rank} --master-addr {address} --master-port {self.port}"
            if self.nodes > 1
            else "--standalone"
        )
        return (
            f"torchrun {where} --nproc-per-node {self.devices_per_node} -m ascendspeed_core.cli "
            + shlex.join(self.words)
        )

    def exports(self) -> list[str]:
        """Return the lines of a shell script that set its variables."""
        return [f"export {name}={shlex.quote(value)}" for name, value in self.environment]


def torchrun_lines(job: Job) -> list[str]:
    """Return a line for each machine, with the variables of all before them."""
    if job.nodes > 1 and len(job.hosts) not in (1, job.nodes):
        raise ConfigError(
            f"hosts names {len(job.hosts)} machines for nodes={job.nodes}; give the first one's name or address, or "
            "those of all: --hosts HOST0 HOST1 ..."
        )
    lines = ["# On every machine:", *job.cluster.setup, *job.exports()]
    for rank in range(job.nodes):
        known = f" ({job.hosts[rank]})" if rank < len(job.hosts) else ""
        lines += [f"# On machine {rank}{known}:"] if job.nodes > 1 else []
        lines.append(job.torchrun(str(rank), shlex.quote(job.hosts[0]) if job.hosts else ""))
    return lines


def slurm_script(job: Job) -> list[str]:
    """Return a script for sbatch: one task on each machine, which starts its processes.

    Slurm sends SIGTERM ten minutes before the time limit; the run saves and ends, and is put into the queue again.
    """
    devices = job.cluster.slurm
    line = job.torchrun('"$SLURM_NODEID"', '"$MASTER_ADDR"')
    return [
        "#!/bin/bash",
        f"#SBATCH --job-name={job.name}",
        f"#SBATCH --nodes={job.nodes}",
        "#SBATCH --ntasks-per-node=1",
        *([f"#SBATCH {devices.format(count=job.devices_per_node)}"] if devices else []),
        "#SBATCH --exclusive",
        f"#SBATCH --signal=TERM@{SAVE_SECONDS}",
        "#SBATCH --requeue",
        "set -euo pipefail",
        *job.cluster.setup,
        *job.exports(),
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_ADDR",
        # The task expands the number of its machine, so the line is quoted whole.
        f"srun --kill-on-bad-exit=1 bash -c {shlex.quote('exec ' + line)}",
    ]


def kubernetes_manifest(job: Job) -> list[str]:
    """Return a TrainJob (Kubeflow Trainer 2): its runtime tells torchrun of the machines by PET_* variables."""
    name = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")[:50] or "run"
    command = [
        "torchrun",
        "--nproc-per-node",
        str(job.devices_per_node),
        "-m",
        "ascendspeed_core.cli",
        *job.words,
    ]
    resource = job.cluster.kubernetes
    each = f"{{{json.dumps(resource)}: {job.devices_per_node}}}"
    # A string of JSON is one of YAML.
    return [
        "apiVersion: trainer.kubeflow.org/v1alpha1",
        "kind: TrainJob",
        "metadata:",
        f"  name: {json.dumps(name)}",
        "spec:",
        "  runtimeRef:",
        "    name: torch-distributed",
        "  trainer:",
        f"    image: {json.dumps(job.image)}",
        f"    numNodes: {job.nodes}",
        "    command:",
        *(f"      - {json.dumps(word)}" for word in command),
        "    env:",
        *(
            line
            for variable, value in job.environment
            for line in (f"      - name: {variable}", f"        value: {json.dumps(value)}")
        ),
        *(["    resourcesPerNode:", f"      requests: {each}", f"      limits: {each}"] if resource else []),
    ]


def hostfile_script(job: Job) -> list[str]:
    """Return a script that is started on each machine of a hostfile, and finds its own line there."""
    _check_hostfile(job)
    found = [
        f"HOSTFILE=${{HOSTFILE:-{shlex.quote(str(job.hostfile))}}}",
        "mapfile -t hosts < <(awk 'NF && $1 !~ /^#/ {print $1}' \"$HOSTFILE\")",
        f'if [ "${{#hosts[@]}}" -ne {job.nodes} ]; then',
        f'  echo "$HOSTFILE names ${{#hosts[@]}} machines, the run is for {job.nodes}" >&2; exit 1',
        "fi",
        "rank=",
        'for own in "$(hostname)" "$(hostname -f 2>/dev/null || true)" $(hostname -I 2>/dev/null || true); do',
        '  for i in "${!hosts[@]}"; do',
        '    if [ -z "$rank" ] && [ "${hosts[$i]}" = "$own" ]; then rank=$i; fi',
        "  done",
        "done",
        'if [ -z "$rank" ]; then echo "$(hostname) is not in $HOSTFILE" >&2; exit 1; fi',
    ]
    return [
        "#!/bin/bash",
        "# Start this on every machine of the hostfile, one of which a line names: ADDRESS. For example:",
        "#   for host in $(awk 'NF && $1 !~ /^#/ {print $1}' hostfile); do",
        '#     ssh "$host" bash "$PWD/run.sh" &',
        "#   done; wait",
        "set -euo pipefail",
        *job.cluster.setup,
        *job.exports(),
        *found,
        "exec " + job.torchrun('"$rank"', '"${hosts[0]}"'),
    ]


def _check_hostfile(job: Job) -> None:
    """Refuse a hostfile that is there and names another number of machines."""
    if not job.hostfile.is_file():
        return
    lines = read_text(job.hostfile, "", "save it as UTF-8", ConfigError, "--hostfile").splitlines()
    named: Sequence[str] = [line.split()[0] for line in lines if line.strip() and not line.startswith("#")]
    if len(named) != job.nodes:
        raise ConfigError(
            f"{job.hostfile} names {len(named)} machines for nodes={job.nodes}; change --nodes, or the file"
        )


SCRIPTS: Mapping[Launcher, Callable[[Job], list[str]]] = MappingProxyType(
    {
        "torchrun": torchrun_lines,
        "slurm": slurm_script,
        "kubernetes": kubernetes_manifest,
        "ascend": hostfile_script,
    }
)
"""By launcher what makes its lines."""
