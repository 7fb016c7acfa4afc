"""LoRA against full fine-tuning of the same model: trained parameters, optimizer memory, time of a step.

Each way lives in a process of its own, so that peak memory is its own; the two step in turns, so that what else the
machine does meets both. Optimizer memory is what AdamW keeps, with the fp32 master weights of narrower formats.

    python benchmarks/finetune.py [--device cpu|cuda] [--dtype float32|bfloat16] [--size NAME ...] [--steps N]
"""

import argparse
import json
import os
import sys
import time
from statistics import median
from typing import Any

from train import CASES, ON_ACCELERATOR, ON_CPU, STEPS, WARM_UP, in_turns, token_ids

from ascendspeed_core.config.lora import LoraConfig
from support.tables import ReportTables

LORA = LoraConfig(lora_target_modules=("all-linear",), lora_r=16, lora_alpha=32)
WAYS = ("full", "LoRA")


def serve(name: str, way: str, device: str, dtype: str) -> None:
    """Step whenever a line comes in; say how long it took and what memory was needed so far."""
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
    from ascendspeed_core.weights.adapters.lora import drawn_adapters, plan_adapters

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    case, place = CASES[name], Device(device)  # type: ignore[arg-type]
    mesh = ParallelMesh(place, Layout())
    source: Any = InitialWeights(case.config, 1)
    if way == "LoRA":
        source = drawn_adapters(source, plan_adapters(LORA, case.config, name), 1)
    model = load_model(source, mesh, getattr(torch, dtype))
    apply_kernels(model, ComputeConfig())
    engine = NativeEngine(model, OptimizerConfig(), mesh)
    ids = token_ids(case).to(device)
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(case.batch, case.length, device=device))
    for _ in sys.stdin:
        started = time.perf_counter()
        train_step(model, engine, [batch], mesh)
        place.synchronize()
        seconds = time.perf_counter() - started
        masters = 0 if dtype == "float32" else 4
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        state = sum(
            value.nbytes
            for kind, (_, value) in engine.optimizer.state().items()
            if kind.startswith("exp_avg")
        )
        figures = {
            "seconds": seconds,
            "trained": trained,
            "optimizer": state + masters * trained,
            "peak": place.peak_memory_bytes(),
        }
        print(json.dumps(figures), flush=True)


def compare(name: str, device: str, dtype: str, steps: int, tables: ReportTables) -> None:
    taken = in_turns(__file__, WAYS, WARM_UP + steps, name, device, dtype)
    seconds = {way: median(one["seconds"] for one in all_[WARM_UP:]) for way, all_ in taken.items()}
    for way, all_ in taken.items():
        last = all_[-1]
        tables.add(
            f"Fine-tuning on {device}: one step of {CASES[name].batch} x {CASES[name].length} tokens, LoRA of rank "
            f"{LORA.lora_r} on all linear layers",
            ("model", "format", "way", "trained parameters", "optimizer, MB", "peak memory, MB", "ms a step",
             "against full"),
            name, dtype, way, f"{last['trained']:,}", f"{last['optimizer'] / 1e6:,.1f}", f"{last['peak'] / 1e6:,.0f}",
            f"{seconds[way] * 1e3:,.0f}", f"{seconds[way] / seconds['full']:.2f}",
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--size", nargs="+", choices=list(CASES))
    parser.add_argument("--steps", type=int, default=STEPS, help="steps that are timed")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(*given.serve, given.device, given.dtype[0])
        return
    tables = ReportTables()
    for name in given.size or (ON_CPU if given.device == "cpu" else ON_ACCELERATOR):
        for dtype in given.dtype:
            compare(name, given.device, dtype, given.steps, tables)
    print("\n".join(tables.render()))


if __name__ == "__main__":
    main()
