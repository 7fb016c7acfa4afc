"""A training step against the same model in transformers (sdpa), with the same optimizer, on the same machine.

Each way lives in a process of its own, so that peak memory is its own; the two step in turns, so that what else the
machine does meets both. The share of peak is the arithmetic of a step, 6 x parameters in matrix products x tokens +
6 x layers x sequence x query width x tokens for causal attention (a forward and twice that for the backward), over
what the largest matrix product reaches in the same format.

    python benchmarks/train.py [--device cpu|cuda] [--dtype float32|bfloat16] [--size NAME ...]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.observability.mfu import training_flops_per_token
from support.models import tiny_config
from support.tables import ReportTables

STEPS, WARM_UP = 5, 2


@dataclass(frozen=True)
class Case:
    """A model and the batch of one step."""

    config: ModelConfig
    batch: int
    length: int


def llama(
    hidden: int, layers: int, heads: int, key_value_heads: int, ffn: int, vocab: int, length: int
) -> ModelConfig:
    return tiny_config(
        vocab_size=vocab, hidden_size=hidden, ffn_hidden_size=ffn, num_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, head_dim=hidden // heads, max_position_embeddings=length,
        initializer_range=0.02,
    )  # fmt: skip


CASES = {
    "30M": Case(llama(384, 8, 6, 6, 1024, 16_000, 512), 2, 512),
    "110M": Case(llama(768, 12, 12, 12, 2048, 16_000, 512), 2, 512),
    "1B": Case(llama(2048, 16, 32, 8, 8192, 32_000, 2048), 4, 2048),
    "hidden 4096, 8 layers": Case(llama(4096, 8, 32, 8, 14_336, 32_000, 4096), 2, 4096),
}
ON_CPU, ON_ACCELERATOR = ("30M", "110M"), ("1B", "hidden 4096, 8 layers")


def flops(case: Case) -> float:
    """Floating point operations of one step; see the top."""
    return training_flops_per_token(case.config, case.length) * case.batch * case.length


def our_step(case: Case, device: str, dtype: str) -> Any:
    import torch

    from ascendspeed_core.build import apply_kernels, load_model
    from ascendspeed_core.config.layout import Layout
    from ascendspeed_core.config.optimizer import OptimizerConfig
    from ascendspeed_core.config.training import ComputeConfig
    from ascendspeed_core.data.micro_batch import MicroBatch
    from ascendspeed_core.device import Device
    from ascendspeed_core.optim.native_engine import NativeEngine
    from ascendspeed_core.parallel.mesh import ParallelMesh
    from ascendspeed_core.training.step import train_step
    from ascendspeed_core.weights import InitialWeights

    mesh = ParallelMesh(Device(device), Layout())
    model = load_model(InitialWeights(case.config, 1), mesh, getattr(torch, dtype))
    apply_kernels(model, ComputeConfig())
    engine = NativeEngine(model, OptimizerConfig(), mesh)
    ids = token_ids(case).to(device)
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(case.batch, case.length, device=device))
    return lambda: train_step(model, engine, [batch], mesh).loss


def their_step(case: Case, device: str, dtype: str) -> Any:
    """transformers in the run's format with fp32 master weights where that is narrower, as ours has them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ascendspeed_core.models.families import find_family

    torch.manual_seed(1)
    config = LlamaConfig(**find_family("llama").write_config(case.config), attn_implementation="sdpa")
    config.use_cache = False
    model = LlamaForCausalLM(config).to(device)
    narrow = dtype != "float32"
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    ids = token_ids(case).to(device)

    def step() -> float:
        with torch.autocast(device, getattr(torch, dtype), enabled=narrow):
            logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def token_ids(case: Case) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(case.config.vocab_size, (case.batch, case.length + 1), generator=generator)


def serve(name: str, way: str, device: str, dtype: str) -> None:
    """Step whenever a line comes in; say how long it took and what memory was needed so far."""
    import torch

    from ascendspeed_core.device import Device

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    place = Device(device)  # type: ignore[arg-type]
    step = {"ours": our_step, "transformers": their_step}[way](CASES[name], device, dtype)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        place.synchronize()
        figures = {"seconds": time.perf_counter() - started, "loss": loss, "bytes": place.peak_memory_bytes()}
        print(json.dumps(figures), flush=True)


def peak_flops(device: str, dtype: str) -> float:
    """What one large matrix product reaches."""
    import torch

    from ascendspeed_core.device import Device

    place = Device(device)  # type: ignore[arg-type]
    size = 2048 if device == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        place.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def in_turns(
    script: str, ways: Sequence[str], rounds: int, name: str, device: str, dtype: str
) -> dict[str, list[dict[str, float]]]:
    """Start a process for each way, let them step in turns, and return what each said of its steps.

    Args:
        script: is started with `--serve NAME WAY`, see `serve`.
        ways: names that it knows.
        rounds: steps of each.
        name: of the case.
        device: for torch.
        dtype: of the weights.
    """
    workers = {
        way: subprocess.Popen(
            [sys.executable, script, "--serve", name, way, "--device", device, "--dtype", dtype],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for way in ways
    }  # fmt: skip
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in workers}
    for _ in range(rounds):
        for way, worker in workers.items():
            assert worker.stdin is not None
            assert worker.stdout is not None
            print("step", file=worker.stdin, flush=True)
            taken[way].append(json.loads(worker.stdout.readline()))
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    return taken


def compare(name: str, device: str, dtype: str, tables: ReportTables) -> None:
    taken = in_turns(__file__, ("transformers", "ours"), WARM_UP + STEPS, name, device, dtype)
    case, peak = CASES[name], peak_flops(device, dtype)
    seconds = {way: median(one["seconds"] for one in all_[WARM_UP:]) for way, all_ in taken.items()}
    for way, all_ in taken.items():
        tables.add(
            f"One training step on {device}: loss, gradients, clipping, AdamW",
            ("model", "parameters", "tokens", "format", "way", "tokens/s", "against transformers", "peak memory, GB",
             "share of the largest product's rate"),
            name, f"{case.config.num_parameters:,}", f"{case.batch} x {case.length}", dtype, way,
            f"{case.batch * case.length / seconds[way]:,.0f}", f"{seconds['transformers'] / seconds[way]:.2f}",
            f"{all_[-1]['bytes'] / 1e9:.2f}", f"{flops(case) / seconds[way] / peak:.0%}",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--dtype", nargs="+", help="formats [default: float32 and bfloat16; on cuda bfloat16]"
    )
    parser.add_argument("--size", nargs="+", choices=list(CASES))
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    on_cpu = given.device == "cpu"
    if given.serve:
        serve(*given.serve, given.device, given.dtype[0])
        return
    tables = ReportTables()
    for name in given.size or (ON_CPU if on_cpu else ON_ACCELERATOR):
        for dtype in given.dtype or (("float32", "bfloat16") if on_cpu else ("bfloat16",)):
            compare(name, given.device, dtype, tables)
    print("\n".join(tables.render()))


if __name__ == "__main__":
    main()
