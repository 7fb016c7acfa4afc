"""Int8 weights beside the model's own format: one product at several numbers of rows, and decoding one text.

python benchmarks/quantization.py [--size small] [--dtypes float32,bfloat16] [--threads 2] [--rounds 5]

Weights are random. What is compared takes turns, and each figure is the best of some rounds; products go round several
copies of the weight, so that none comes from the cache.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from ascendspeed_core.build import apply_inference_kernels, load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.kernels import int8
from ascendspeed_core.kernels.huge_pages import HugePages
from ascendspeed_core.models.int8 import Int8Weight, largest_of_rows, quantize, weights_nbytes
from ascendspeed_core.models.packed_weight import PackedMatrix, pack, pack_weights
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import open_weights
from ascendspeed_infer.engine.llm_engine import LLMEngine
from infer import NEW_TOKENS, PROMPT_TOKENS, SIZES, VOCAB, best, loaded_ours, ours_alone, row, save_model

SIDE, COPIES, ROWS = 4096, 4, (1, 4, 16, 128, 512)
SECONDS_PER_CASE = 2.0


def loaded_int8(folder: Path, dtype: str) -> LLMEngine:
    mesh = ParallelMesh.create(Device("cpu"), Layout())
    model = load_model(
        open_weights(folder),
        mesh,
        getattr(torch, dtype),
        joined_projections=True,
        weight_quantization="int8",
    )
    pack_weights(model)
    apply_inference_kernels(model, mesh)
    return LLMEngine(model.eval(), mesh)


def milliseconds(works: Mapping[str, Callable[[int], object]]) -> dict[str, float]:
    """Best of each, in turns, on one copy of the weight after the other."""
    took: dict[str, list[float]] = {name: [] for name in works}
    number, end = 0, time.perf_counter() + SECONDS_PER_CASE
    while time.perf_counter() < end:
        for name, work in works.items():
            # The first call brings what the product keeps between calls back into the cache.
            work(number % COPIES)
            started = time.perf_counter()
            work((number + 1) % COPIES)
            took[name].append(time.perf_counter() - started)
            number += 1
    return {name: 1e3 * min(times) for name, times in took.items()}


def measure_products(dtype: torch.dtype) -> None:
    plain = [torch.randn(SIDE, SIDE).mul_(0.02).to(dtype) for _ in range(COPIES)]
    # What a model that answers on a CPU holds.
    memory = HugePages()
    floats = [pack(weight, memory) for weight in plain]
    workspace = int8.Workspace()
    held = [quantize(weight, largest_of_rows(weight), workspace) for weight in plain]
    name = str(dtype).removeprefix("torch.")
    print(f"\n{name}: a weight of {SIDE} x {SIDE}, milliseconds")
    print(f"{'rows':>6s} {name:>10s} {'int8':>10s} {'ratio':>6s} {'torch op':>10s} {'made wide':>10s} taken")
    for rows in ROWS:
        x = torch.randn(rows, SIDE).to(dtype)

        works = {
            "float": partial(multiply, x, floats),
            "int8": partial(multiply_int8, partial(int8.int8_linear, workspace=workspace), x, held),
            "wide": partial(multiply_int8, partial(int8.wide_linear, workspace=workspace), x, held),
        }
        # torch's operator is scalar in float32: seconds for many rows.
        if dtype == torch.bfloat16 or rows <= 4:
            works["integer"] = partial(multiply_int8, int8.integer_linear, x, held)
        found = milliseconds(works)
        print(
            f"{rows:6d} {found['float']:10.3f} {found['int8']:10.3f} {found['float'] / found['int8']:6.2f} "
            f"{found.get('integer', float('nan')):10.3f} {found['wide']:10.3f}",
            int8.implementation_for(x, held[0].integers),
            flush=True,
        )


def multiply(x: torch.Tensor, weights: Sequence[PackedMatrix], copy: int) -> torch.Tensor:
    return weights[copy].product(x, None)


def multiply_int8(
    product: int8.Int8Linear, x: torch.Tensor, weights: Sequence[Int8Weight], copy: int
) -> torch.Tensor:
    return product(x, weights[copy].integers, weights[copy].scale)


def peak_of_loading(folder: Path, dtype: str, function: str) -> float:
    """Memory in bytes that loading adds at its peak to a process that has imported all of it."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import pathlib, quantization\n"
        "of = lambda kind: int(pathlib.Path('/proc/self/status').read_text().split(kind)[1].split()[0]) * 1024\n"
        "before = of('VmRSS:')\n"
        f"kept = quantization.{function}(pathlib.Path({str(folder)!r}), {dtype!r}); print(of('VmHWM:') - before)"
    )
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def measure_decoding(size: str, dtype: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(size, dtype, folder)
        peaks = [peak_of_loading(folder, dtype, function) for function in ("loaded_ours", "loaded_int8")]
        plain, held = loaded_ours(folder, dtype), loaded_int8(folder, dtype)
        loading = best(rounds, lambda: loaded_ours(folder, dtype), lambda: loaded_int8(folder, dtype))
    prompt = random.Random(0).choices(range(3, VOCAB), k=PROMPT_TOKENS)
    works = [ours_alone(engine, prompt, new) for engine in (plain, held) for new in (1, NEW_TOKENS + 1)]
    first, whole, held_first, held_whole = best(rounds, *works)
    step, held_step = (whole - first) / NEW_TOKENS, (held_whole - held_first) / NEW_TOKENS
    print(f"\n{dtype}: {size}, {plain.model.config.num_parameters / 1e6:.0f} million parameters")
    sizes = [weights_nbytes(engine.model) / 1e6 for engine in (plain, held)]
    row("weights, int8", f"{sizes[1]:.0f} MB", f"{dtype} {sizes[0]:.0f} MB")
    row("peak memory of loading", f"{peaks[1] / 1e6:.0f} MB", f"{dtype} {peaks[0] / 1e6:.0f} MB")
    row("time of loading", f"{loading[1]:.2f} s", f"{dtype} {loading[0]:.2f} s")
    row(f"first token after {PROMPT_TOKENS}", f"{held_first:.3f} s", f"{dtype} {first:.3f} s")
    row(
        "one text, tokens per second",
        f"{1 / held_step:.1f}",
        f"{dtype} {1 / step:.1f}: {step / held_step:.2f} x",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in options.dtypes.split(","):
        measure_products(getattr(torch, dtype))
        measure_decoding(options.size, dtype, options.rounds)


if __name__ == "__main__":
    main()
