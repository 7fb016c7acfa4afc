"""Products of a few rows or many with weights for inference on a CPU: panels, oneDNN's order, and plain weights.

python benchmarks/products.py [--side 2048] [--dtypes float32,bfloat16] [--threads 2] [--rounds 5]

A product goes round copies of the weight that together are larger than any cache, as in a model. Ways take turns; each
figure is the best of `--rounds` over all copies. Few rows take as long as reading the weights, many as the arithmetic.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ascendspeed_core.kernels.huge_pages import HugePages
from ascendspeed_core.kernels.onednn import has_packed_product, packed, packed_linear
from ascendspeed_core.kernels.panels import Panels, why_not

ROWS, BYTES = (1, 4, 16, 64, 256, 2048), 1 << 28
Multiply = Callable[[torch.Tensor], None]


def ways(side: int, dtype: torch.dtype) -> dict[str, Multiply]:
    """Return what multiplies with all copies, by name."""
    copies = max(BYTES // (side * side * dtype.itemsize), 2)
    plain = [torch.randn(side, side).to(dtype) for _ in range(copies)]
    found: dict[str, Multiply] = {"plain": lambda x: _each(lambda w: F.linear(x, w), plain)}
    if has_packed_product(dtype, torch.device("cpu")):
        ordered = [packed(weight) for weight in plain]
        found["oneDNN"] = lambda x: _each(lambda w: packed_linear(x, w, None), ordered)
    reason = why_not(dtype, side)
    if reason is None:
        memory = HugePages()
        panels = [Panels(weight, memory) for weight in plain]
        found["panels"] = lambda x: _each(lambda w: w.product(x, None), panels)
    else:
        print(f"no panels of {dtype}: {reason}")
    return found


def _each(multiply: Callable[[Any], torch.Tensor], weights: Sequence[Any]) -> None:
    for weight in weights:
        multiply(weight)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--side", type=int, default=2048, help="inputs and outputs of the weight")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    print(f"weights of {given.side} x {given.side}, {given.threads} threads, best of {given.rounds}\n")
    print("| format | rows | way | ms | GB/s | GFLOPS | time / panels' |")
    print("|---|---|---|---|---|---|---|")
    for name in given.dtypes.split(","):
        dtype = getattr(torch, name)
        multiply = ways(given.side, dtype)
        copies = max(BYTES // (given.side**2 * dtype.itemsize), 2)
        for rows in ROWS:
            x = torch.randn(rows, given.side).to(dtype)
            took = {way: float("inf") for way in multiply}
            for _ in range(given.rounds + 1):
                for way, run in multiply.items():
                    started = time.perf_counter()
                    run(x)
                    took[way] = min(took[way], (time.perf_counter() - started) / copies)
            for way, seconds in took.items():
                numbers = given.side**2
                read, computed = numbers * dtype.itemsize / seconds / 1e9, 2 * rows * numbers / seconds / 1e9
                ratio = f"{seconds / took['panels']:.2f}" if "panels" in took else ""
                print(
                    f"| {name} | {rows} | {way} | {seconds * 1e3:.3f} | {read:.1f} | {computed:.0f} | {ratio} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
