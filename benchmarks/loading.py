"""Loading a Hugging Face folder beside reading its files, in time and in memory.

python benchmarks/loading.py [--size small] [--cases float32,bfloat16:float32] [--tp 1,2] [--rounds 3]

Each case runs in processes of its own, one for each tensor-parallel device. Reading puts as many bytes of the files as
the process has weights there into fresh memory of the weights' size, and zeros where the weights are wider than in the
files; reading and loading take turns, and each figure is the best of `--rounds`. The peak is what the first loading
adds to the memory of a process that has imported all of it, pages of mapped files included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from infer import SIZES, save_model

GOAL_TIME, GOAL_PEAK = 1.5, 1.1


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    kept = work()
    took = time.perf_counter() - started
    del kept
    return took


def memory(kind: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) * 1024


def read_files(folder: Path, stored_bytes: int, weight_bytes: int, share: float) -> object:
    """Read a share of the files into fresh memory, and fill the rest of it."""
    import torch

    # Of the allocator that gives weights theirs: with numpy's huge pages it would be another measurement.
    place = torch.empty(weight_bytes, dtype=torch.uint8)
    view, at = memoryview(place.numpy()), 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            end = min(at + int(path.stat().st_size * share), stored_bytes)
            while at < end:
                at += file.readinto(view[at:end])
    place[at:] = 0
    return place


def measure(folder: Path, dtype: str, tp: int, rank: int, rounds: int) -> None:
    """Run one process of a case and print its figures."""
    import torch

    from ascendspeed_core.build import load_model
    from ascendspeed_core.config.layout import Layout
    from ascendspeed_core.device import Device
    from ascendspeed_core.parallel.mesh import ParallelMesh
    from ascendspeed_core.weights import open_weights

    torch.set_num_threads(1)
    if tp > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/processes", rank=rank, world_size=tp
        )
    mesh = ParallelMesh.create(Device("cpu"), Layout(tp=tp))

    def load() -> torch.nn.Module:
        return load_model(open_weights(folder), mesh, getattr(torch, dtype), joined_projections=True)

    mesh.barrier()
    before = memory("VmRSS")
    model = load()
    peak = memory("VmHWM") - before
    weights = list(model.parameters())
    size = sum(parameter.nbytes for parameter in weights)
    stored = next(iter(open_weights(folder).tensors().values())).dtype.itemsize
    stored_bytes = sum(parameter.numel() for parameter in weights) * stored
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    del model, weights
    reads, loads = [], []
    for _ in range(rounds):
        mesh.barrier()
        reads.append(seconds(lambda: read_files(folder, stored_bytes, size, min(stored_bytes / total, 1))))
        mesh.barrier()
        loads.append(seconds(load))
    print(json.dumps({"read": min(reads), "load": min(loads), "peak": peak, "size": size}))


def run_case(folder: Path, dtype: str, tp: int, rounds: int) -> list[dict[str, float]]:
    """Run the processes of a case; return the figures of each."""
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--process", str(folder), dtype, str(tp), str(rank), str(rounds)],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(tp)
    ]
    answers = [process.communicate()[0] for process in started]
    (folder / "processes").unlink(missing_ok=True)
    if any(process.returncode for process in started):
        raise SystemExit("a process failed; see above")
    return [json.loads(answer) for answer in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--cases",
        default="float32,bfloat16,bfloat16:float32",
        help="formats, or STORED:LOADED, separated by commas",
    )
    parser.add_argument("--tp", default="1,2", help="tensor-parallel sizes, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.size}, best of {options.rounds}; goals {GOAL_TIME} x reading, {GOAL_PEAK} x the weights")
    print(
        f"{'stored -> loaded':24s} {'tp':>2s} {'weights':>9s} {'read':>8s} {'load':>8s} {'ratio':>6s} {'peak':>6s}"
    )
    cases = [case.partition(":") for case in options.cases.split(",")]
    for stored in dict.fromkeys(case[0] for case in cases):
        with tempfile.TemporaryDirectory() as name:
            save_model(options.size, stored, Path(name))
            for loaded in (case[2] or case[0] for case in cases if case[0] == stored):
                for tp in map(int, options.tp.split(",")):
                    figures = run_case(Path(name), loaded, tp, options.rounds)
                    read, load, size = (max(one[key] for one in figures) for key in ("read", "load", "size"))
                    peak = max(one["peak"] / one["size"] for one in figures)
                    print(
                        f"{stored + ' -> ' + loaded:24s} {tp:2d} {size / 1e6:6.0f} MB {read:6.3f} s {load:6.3f} s "
                        f"{load / read:6.2f} {peak:6.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        measure(Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:7]))
    else:
        main()
