"""Triangle attention against attention with all scores in memory and against torch's fused one: time and peak.

python benchmarks/attention.py [--lengths 4096,8192]
"""

import argparse
import time

import torch

from ascendspeed_core.kernels.registry import implementations
from ascendspeed_core.kernels.triangle import computed_share

HEADS, HEAD_DIM, REPEATS = 8, 64, 3


def seconds(name: str, length: int) -> tuple[float, float]:
    """Median seconds of forward and of backward."""
    inputs = [torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3)]
    gradient = torch.randn(1, HEADS, length, HEAD_DIM)
    forward, backward = [], []
    for _ in range(REPEATS):
        started = time.perf_counter()
        out = implementations("attention")[name](*inputs, None)
        done = time.perf_counter()
        torch.autograd.grad(out, inputs, gradient)
        forward.append(done - started)
        backward.append(time.perf_counter() - done)
    return sorted(forward)[REPEATS // 2], sorted(backward)[REPEATS // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="4096,8192")
    lengths = [int(length) for length in parser.parse_args().lengths.split(",")]
    print(
        f"fp32, batch 1, {HEADS} heads of {HEAD_DIM}, {torch.get_num_threads()} threads, median of {REPEATS}"
    )
    print("length  attention  forward  backward  both, against reference  scores computed")
    for length in lengths:
        whole = sum(seconds("reference", length))
        for name in ("sdpa", "triangle", "reference"):
            forward, backward = seconds(name, length)
            share = computed_share(length, length) if name == "triangle" else 1.0
            shown = f"{share:.3f}" if name != "sdpa" else "by torch"
            ratio = (forward + backward) / whole
            print(f"{length:6d}  {name:9s}  {forward:6.2f}s  {backward:7.2f}s  {ratio:23.2f}  {shown}")


if __name__ == "__main__":
    main()
