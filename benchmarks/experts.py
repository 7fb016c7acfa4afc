"""A training step with experts: against a dense model with as many active parameters, and against transformers' own.

Eight experts, two for each token. The dense model has MLPs as wide as two experts: the same parameters and the same
arithmetic for each token, but for the router. Each way lives in a process of its own and the ways step in turns, so
that what else the machine does meets all of them; medians, and ratios of one run.

    python benchmarks/experts.py [--device cpu|cuda] [--dtype float32|bfloat16]
"""

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from statistics import median
from typing import Any

from train import STEPS, WARM_UP, Case, in_turns, llama, token_ids

from ascendspeed_core.config.experts import Experts
from support.tables import ReportTables

COUNT, PER_TOKEN = 8, 2
SIZES = {
    "cpu": Case(llama(384, 6, 6, 6, 512, 8_000, 512), 2, 512),
    "cuda": Case(llama(2048, 8, 16, 8, 2816, 32_000, 2048), 4, 2048),
}
"""Width of the MLPs is that of one expert."""
DENSE, LOOP, GROUPED, THEIRS = "dense, as many active", "a loop over experts", "grouped_mm", "transformers"


def case_of(device: str, way: str) -> Case:
    case = SIZES[device]
    width = case.config.ffn_hidden_size
    if way == DENSE:
        changes: dict[str, Any] = {"ffn_hidden_size": PER_TOKEN * width}
    else:
        experts = Experts(count=COUNT, per_token=PER_TOKEN, ffn_hidden_size=width)
        changes = {"family": "mixtral", "experts": experts}
    return replace(case, config=case.config.model_copy(update=changes))


def our_step(case: Case, way: str, device: str, dtype: str) -> Any:
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

    mesh = ParallelMesh(Device(device), Layout())  # type: ignore[arg-type]
    model = load_model(InitialWeights(case.config, 1), mesh, getattr(torch, dtype))
    product = {LOOP: "reference", GROUPED: "grouped_mm"}.get(way, "auto")
    apply_kernels(model, ComputeConfig(grouped_product=product))
    engine = NativeEngine(model, OptimizerConfig(), mesh)
    ids = token_ids(case).to(device)
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(case.batch, case.length, device=device))
    return lambda: train_step(model, engine, [batch], mesh).loss


def their_step(case: Case, device: str, dtype: str) -> Any:
    """transformers with its own default for experts, which it is asked for and says."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from ascendspeed_core.models.families import find_family

    torch.manual_seed(1)
    config = MixtralConfig(**find_family("mixtral").write_config(case.config), attn_implementation="sdpa")
    config.use_cache = False
    model = MixtralForCausalLM(config).to(device)
    print(f"transformers' experts: {model.config._experts_implementation}", file=sys.stderr)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.01, fused=True)
    ids = token_ids(case).to(device)

    def step() -> float:
        with torch.autocast(device, getattr(torch, dtype), enabled=dtype != "float32"):
            logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def serve(way: str, device: str, dtype: str) -> None:
    """Step whenever a line comes in; say how long it took and what memory was needed so far."""
    import torch

    from ascendspeed_core.device import Device

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    place = Device(device)  # type: ignore[arg-type]
    case = case_of(device, way)
    step = their_step(case, device, dtype) if way == THEIRS else our_step(case, way, device, dtype)
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step()
        place.synchronize()
        figures = {"seconds": time.perf_counter() - started, "loss": loss, "bytes": place.peak_memory_bytes()}
        print(json.dumps(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=list(SIZES))
    parser.add_argument("--dtype", nargs="+", default=["float32"])
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve[1], given.device, given.dtype[0])
        return
    tables = ReportTables()
    for dtype in given.dtype:
        taken = in_turns(
            __file__, (DENSE, LOOP, GROUPED, THEIRS), WARM_UP + STEPS, "step", given.device, dtype
        )
        seconds = {way: median(one["seconds"] for one in all_[WARM_UP:]) for way, all_ in taken.items()}
        for way, all_ in taken.items():
            case = case_of(given.device, way)
            tables.add(
                f"One training step with {COUNT} experts, {PER_TOKEN} of each token, on {given.device}",
                ("way", "parameters", "format", "tokens/s", "time over dense", "time over transformers",
                 "peak memory, GB"),
                way, f"{case.config.num_parameters:,}", dtype, f"{case.batch * case.length / seconds[way]:,.0f}",
                f"{seconds[way] / seconds[DENSE]:.2f}", f"{seconds[way] / seconds[THEIRS]:.2f}",
                f"{all_[-1]['bytes'] / 1e9:.2f}",
            )  # fmt: skip
    print("\n".join(tables.render()))


if __name__ == "__main__":
    main()
