"""`asd-infer serve` under load: throughput, time to first token and between tokens, memory, and its own cost.

    python benchmarks/serve.py --size small --clients 1 8 32 128
    python benchmarks/serve.py --size small --folder model --only-make
    python -m vllm.entrypoints.openai.api_server --model model --served-model-name bench --port 8001 \\
        --dtype float32 --max-num-seqs 128
    python benchmarks/serve.py --size small --folder model --other http://127.0.0.1:8001/v1 --other-pid PID

Each client sends one streamed completion after another: prompts of 64 to 512 tokens, answers of 16 to 256, the same for
every server. The server's own cost is the processor time of its threads beside the engine's: HTTP, JSON, tokens to
text. With `--other` the same load runs on another server with OpenAI's API, in turns with it.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parent))

from infer import SIZES, VOCAB, save_model
from support.tables import ReportTables

MODEL = "bench"
PROMPT_TOKENS, NEW_TOKENS = (64, 512), (16, 256)


@dataclass
class Measured:
    """What one number of clients got.

    Attributes:
        seconds: from the first request to the last token.
        new_tokens: of all answers.
        first: seconds to the first token of each request.
        between: seconds between its tokens.
    """

    seconds: float = 0.0
    new_tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


def save_tokenizer(folder: Path) -> None:
    """A word for each id, so that every token has a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w2", bos_token="w1").save_pretrained(folder)


async def ask(session: aiohttp.ClientSession, url: str, number: int, scale: float, found: Measured) -> None:
    draw = random.Random(number)
    length, new = (max(int(draw.randint(*bounds) * scale), 2) for bounds in (PROMPT_TOKENS, NEW_TOKENS))
    fields = {
        "model": MODEL, "prompt": " ".join(f"w{draw.randrange(3, VOCAB)}" for _ in range(length)), "max_tokens": new,
        "temperature": 1, "ignore_eos": True, "stream": True,
    }  # fmt: skip
    started, times = time.perf_counter(), list[float]()
    async with session.post(f"{url}/completions", json=fields) as answer:
        assert answer.status == 200, await answer.text()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    found.first.append(times[0] - started)
    found.between += [later - earlier for earlier, later in pairwise(times)]
    found.new_tokens += new


async def load(url: str, clients: int, rounds: int, scale: float) -> Measured:
    """Let each client send `rounds` requests, one after another."""
    found = Measured()
    timeout, connector = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def client(own: int) -> None:
            for turn in range(rounds):
                # No prompt was sent before: servers keep what they computed of prompts.
                await ask(session, url, clients * 1000 + clients * turn + own, scale, found)

        started = time.perf_counter()
        await asyncio.gather(*(client(number) for number in range(clients)))
        found.seconds = time.perf_counter() - started
    return found


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def thread_seconds(process: psutil.Process) -> dict[int, float]:
    """Processor time of each thread."""
    return {one.id: one.user_time + one.system_time for one in process.threads()}


def own_cost(before: dict[int, float], after: dict[int, float], engine_threads: int) -> float:
    """Return the processor time of all threads but the busiest, which are the engine's, as a share of theirs."""
    spent = sorted((after[one] - before.get(one, 0.0) for one in after), reverse=True)
    return sum(spent[engine_threads:]) / max(sum(spent[:engine_threads]), 1e-9)


def resident_megabytes(pid: int) -> float:
    """Memory of a process and those that it started."""
    first = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (first, *first.children(recursive=True))) / 1e6


def row(name: str, clients: int, found: Measured, more: list[str]) -> list[str]:
    times = [
        quantile(values, share) * 1e3 for values in (found.first, found.between) for share in (0.5, 0.99)
    ]
    shown = [f"{one:,.0f}" for one in times]
    return [name, str(clients), f"{found.new_tokens / found.seconds:,.0f}", *shown, *more]


def start_server(
    folder: Path, dtype: str, threads: int, options: list[str]
) -> tuple[subprocess.Popen[str], str]:
    command = [
        sys.executable, "-m", "ascendspeed_infer.cli", "serve", "--load", str(folder), "--served-model-name", MODEL,
        "--port", "0", "--device", "cpu", "--dtype", dtype, "--max-num-seqs", "128", *options,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if line.strip().startswith(f"serving {MODEL} on ") or f"serving {MODEL} on " in line:
            return process, line.partition(f"serving {MODEL} on ")[2].split()[0] + "/v1"
    raise RuntimeError("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of the lengths of prompts and answers"
    )
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of the server")
    parser.add_argument("--folder", type=Path, help="where the model is, or is made")
    parser.add_argument("--only-make", action="store_true", help="make the model, and measure nothing")
    parser.add_argument("--other-pid", type=int, help="process of the other server, for its memory")
    parser.add_argument("--other", help="address of another server, measured in turns")
    parser.add_argument(
        "--serve-option", action="append", default=[], help="further options of asd-infer serve"
    )
    given: Any = parser.parse_args()
    tables = ReportTables()
    head = [
        "server",
        "clients",
        "tokens/s",
        "first p50 ms",
        "first p99",
        "between p50 ms",
        "between p99",
        "own cost",
        "memory MB",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder or Path(name)
        folder.mkdir(exist_ok=True)
        if not (folder / "tokenizer.json").exists():
            save_model(given.size, given.dtype, folder)
            save_tokenizer(folder)
        if given.only_make:
            return
        process, url = start_server(folder, given.dtype, given.threads, given.serve_option)
        try:
            watched = psutil.Process(process.pid)
            asyncio.run(load(url, 2, 1, 0.1))
            for clients in given.clients:
                before = thread_seconds(watched)
                found = asyncio.run(load(url, clients, given.rounds, given.scale))
                cost = own_cost(before, thread_seconds(watched), given.threads)
                kept = f"{resident_megabytes(process.pid):,.0f}"
                shown = row("asd-infer serve", clients, found, [f"{cost:.1%}", kept])
                print(json.dumps(dict(zip(head, shown, strict=True))), flush=True)
                tables.add(f"serving {given.size}, {given.dtype}", head, *shown)
                if given.other:
                    theirs = asyncio.run(load(given.other, clients, given.rounds, given.scale))
                    kept = f"{resident_megabytes(given.other_pid):,.0f}" if given.other_pid else ""
                    shown = row(given.other, clients, theirs, ["", kept])
                    print(json.dumps(dict(zip(head, shown, strict=True))), flush=True)
                    tables.add(f"serving {given.size}, {given.dtype}", head, *shown)
        finally:
            process.terminate()
            process.wait()
    print("\n".join(tables.render()))


if __name__ == "__main__":
    main()
