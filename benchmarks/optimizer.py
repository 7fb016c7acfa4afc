"""One update of weights by torch's AdamW implementations and SGD: time, and memory beside weights and state.

python benchmarks/optimizer.py [--layers 4] [--hidden-size 1024]

`adam` and `fused_adam` take the fused one on a CPU and on CUDA. Each runs in a process of its own, so that the highest
memory that the system has seen of it is its own.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from typing import Any

REPEATS = 5


def candidates() -> dict[str, tuple[str, dict[str, Any]]]:
    return {
        "adamw, tensor by tensor": ("AdamW", {"foreach": False}),
        "adamw, foreach": ("AdamW", {"foreach": True}),
        "adamw, fused": ("AdamW", {"fused": True}),
        "sgd, tensor by tensor": ("SGD", {"momentum": 0.9, "foreach": False}),
        "sgd, fused": ("SGD", {"momentum": 0.9, "fused": True}),
    }


def measure(name: str, layers: int, hidden_size: int) -> tuple[float, float, float]:
    """Return seconds of an update, and MiB of weights with gradients and state, and of what the update needs more."""
    import torch

    kind, options = candidates()[name]
    shapes = [(hidden_size, hidden_size)] * 4 + [(hidden_size * 3, hidden_size)] * 3 + [(hidden_size,)] * 2
    weights = [torch.ones(shape) for shape in shapes * layers]
    optimizer = getattr(torch.optim, kind)(weights, lr=1e-3, **options)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
        state = ("exp_avg", "exp_avg_sq") if kind == "AdamW" else ("momentum_buffer",)
        optimizer.state[weight] = {moment: torch.ones_like(weight) for moment in state}
        if kind == "AdamW":
            optimizer.state[weight]["step"] = torch.tensor(1.0)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    copies = 2 + len(state)
    return statistics.median(seconds), sum(w.numel() for w in weights) * 4 * copies / 2**20, more / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=1024)
    asked = parser.parse_args()
    print(f"fp32, {asked.layers} layers of hidden size {asked.hidden_size}, median of {REPEATS} updates")
    print("implementation           seconds  weights, gradients, state  more while it runs")
    for name in candidates():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, held, more = pool.apply(measure, (name, asked.layers, asked.hidden_size))
        print(f"{name:23s}  {seconds:7.3f}  {held:21.0f} MiB  {more:14.0f} MiB")


if __name__ == "__main__":
    main()
