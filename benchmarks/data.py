"""Tokenizing side by side on the same text: the tokenizers alone, the whole command, and Megatron-LM's way of doing it.

Rates are slopes between two sizes, so starting does not count; it stands apart. Each measurement is a process of its
own; memory is the proportional share (PSS) of all its processes together, sampled. On a machine that does other things
too, compare the tokens per CPU second.

    python benchmarks/data.py [MEGABYTES]
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.corpus import make_texts
from support.shared_data import SHARED_DATA, TOKENIZERS
from support.tables import ReportTables

CORES = 2
BATCH_BYTES = 4 << 20
CORPORA = ("wikipedia_en.jsonl", "classics_zh.jsonl", "c4_demo.jsonl")
SLOW_MEGABYTES = (6, 24)
"""Sizes for what reaches some megabytes a second; its rate does not depend on them."""


def write_text(path: Path, megabytes: float, lines: list[str]) -> int:
    """Write lines over and over until so much text is in the file; return its bytes of text."""
    text_bytes = 0
    with path.open("w", encoding="utf-8") as file:
        for line in cycle(lines):
            file.write(line)
            text_bytes += len(json.loads(line)["text"].encode())
            if text_bytes >= megabytes * 1e6:
                return text_bytes
    raise AssertionError


def batches(path: Path) -> Iterator[list[str]]:
    held: list[str] = []
    size = 0
    with path.open(encoding="utf-8") as file:
        for line in file:
            held.append(json.loads(line)["text"])
            size += len(line)
            if size >= BATCH_BYTES:
                yield held
                held, size = [], 0
    if held:
        yield held


def alone(path: Path, encode: Callable[[list[str]], int]) -> tuple[int, float, float]:
    """Return tokens, seconds and CPU seconds of encoding; reading does not count."""
    tokens, seconds, cpu = 0, 0.0, 0.0
    for texts in batches(path):
        started, cpu_started = time.perf_counter(), time.process_time()
        tokens += encode(texts)
        seconds += time.perf_counter() - started
        cpu += time.process_time() - cpu_started
    return tokens, seconds, cpu


def gigatoken_alone(path: Path, tokenizer: Path, folder: Path) -> tuple[int, float, float]:
    import gigatoken

    from ascendspeed_data.fast_tokenizer import gigatoken_json
    from ascendspeed_data.tokenizer import load_tokenizer

    backend = gigatoken.Tokenizer.from_json(gigatoken_json(load_tokenizer(tokenizer))).backend
    return alone(path, lambda texts: len(backend.encode_batch(texts, parallel=True).layout.content.data))


def tokenizers_batch(path: Path, tokenizer: Path, folder: Path) -> tuple[int, float, float]:
    from tokenizers import Tokenizer

    from ascendspeed_data.fast_tokenizer import gigatoken_json
    from ascendspeed_data.tokenizer import load_tokenizer

    made = Tokenizer.from_str(gigatoken_json(load_tokenizer(tokenizer)))
    return alone(path, lambda texts: sum(len(e.ids) for e in made.encode_batch_fast(texts)))


def sentencepiece_threads(path: Path, tokenizer: Path, folder: Path) -> tuple[int, float, float]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
    return alone(path, lambda texts: sum(map(len, model.encode(texts, out_type="numpy", num_threads=CORES))))


def whole_command(path: Path, tokenizer: Path, folder: Path) -> tuple[int, float, float]:
    command = [
        sys.executable, "-m", "ascendspeed_data.cli", "preprocess", "--input", path, "--output-prefix", folder / "ours",
        "--tokenizer-name-or-path", tokenizer, "--workers", str(CORES), "--overwrite",
    ]  # fmt: skip
    started = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    manifest = json.loads((folder / "ours_text_document.manifest.json").read_text())
    return manifest["num_tokens"], seconds, children_cpu()


def megatron_style(path: Path, tokenizer: Path, folder: Path) -> tuple[int, float, float]:
    """A pool encodes line by line, 32 at a time; the parent gives each document to megatron-core's builder."""
    from multiprocessing import get_context

    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    started, cpu_started = time.perf_counter(), time.process_time()
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=np.uint16)
    tokens = 0
    with (
        path.open(encoding="utf-8") as file,
        get_context("fork").Pool(CORES, _open_model, (str(tokenizer / "tokenizer.model"),)) as pool,
    ):
        for ids in pool.imap(_encode_line, file, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
            tokens += len(ids)
        pool.close()
        pool.join()
    builder.finalize(str(folder / "theirs.idx"))
    own = time.process_time() - cpu_started
    return tokens, time.perf_counter() - started, own + children_cpu()


MODEL: list[Any] = []


def _open_model(path: str) -> None:
    import sentencepiece

    MODEL.append(sentencepiece.SentencePieceProcessor(model_file=path))


def _encode_line(line: str) -> list[int]:
    return [*MODEL[0].encode(json.loads(line)["text"]), 2]


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


METHODS: dict[str, tuple[Callable[[Path, Path, Path], tuple[int, float, float]], bool]] = {
    "gigatoken alone": (gigatoken_alone, True),
    "asd-data preprocess": (whole_command, True),
    "SentencePiece, 2 threads": (sentencepiece_threads, False),
    "tokenizers, batches": (tokenizers_batch, False),
    "megatron-core's writer, document by document": (megatron_style, False),
}


@dataclass(frozen=True)
class Measured:
    tokens: int
    seconds: float
    cpu: float
    peak_mib: float


def measure(method: str, path: Path, tokenizer: Path, folder: Path) -> Measured:
    """Run one method in a process of its own, and watch the memory of it and its children."""
    command = [sys.executable, __file__, "--method", method, str(path), str(tokenizer), str(folder)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": str(CORES),
        "PYTHONWARNINGS": "ignore",
    }
    running = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while running.poll() is None:
            peak = max(peak, sum(pss_mib(pid) for pid in family(running.pid)))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = running.communicate()
    watcher.join()
    assert running.returncode == 0, method
    tokens, seconds, cpu = json.loads(output.splitlines()[-1])
    return Measured(tokens, seconds, cpu, peak)


def family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(found for child in children for found in family(int(child)))]


def pss_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def corpus_and_tokenizer(folder: Path) -> tuple[list[str], Path, str]:
    """Real text and LLaMA's tokenizer, or made text and a made tokenizer."""
    if SHARED_DATA.is_dir():
        lines = [
            line for name in CORPORA for line in (SHARED_DATA / "pretrain" / name).open(encoding="utf-8")
        ]
        return lines, TOKENIZERS / "llama", "Wikipedia, Chinese classics and C4, repeated; LLaMA's tokenizer"
    from ascendspeed_data.train_tokenizer import TokenizerTraining, train_sentencepiece

    lines = [json.dumps({"text": text}) + "\n" for text in make_texts(20_000)]
    (folder / "made.jsonl").write_text("".join(lines))
    training = TokenizerTraining(400)
    tokenizer = train_sentencepiece([str(folder / "made.jsonl")], "text", folder / "tokenizer", training)
    return lines, tokenizer, "made text, repeated; a made tokenizer"


def main(megabytes: float) -> None:
    tables = ReportTables()
    with tempfile.TemporaryDirectory(prefix="asd-bench-") as name:
        folder = Path(name)
        lines, tokenizer, what = corpus_and_tokenizer(folder)
        sizes = {"large": (megabytes / 5, megabytes), "small": SLOW_MEGABYTES}
        files, text_bytes = {}, {}
        for kind, pair in sizes.items():
            for end, size in enumerate(pair):
                files[kind, end] = folder / f"{kind}{end}.jsonl"
                text_bytes[kind, end] = write_text(files[kind, end], size, lines)
        rates = {}
        for method, (_, is_fast) in METHODS.items():
            kind = "large" if is_fast else "small"
            low, high = (measure(method, files[kind, end], tokenizer, folder) for end in (0, 1))
            tokens, seconds = high.tokens - low.tokens, high.seconds - low.seconds
            rates[method] = (tokens / seconds, tokens / (high.cpu - low.cpu))
            more_bytes = text_bytes[kind, 1] - text_bytes[kind, 0]
            start = low.seconds - low.tokens / rates[method][0]
            tables.add(
                f"Tokenizing on {CORES} cores ({what}; {megabytes:,.0f} MB for the fast ones)",
                ("", "M tokens/s", "MB/s", "M tokens/CPU s", "peak MiB", "start, s"),
                method, f"{rates[method][0] / 1e6:.2f}", f"{more_bytes / 1e6 / seconds:.1f}",
                f"{rates[method][1] / 1e6:.2f}", f"{high.peak_mib:,.0f}",
                f"{max(start, 0):.1f}" if method == "asd-data preprocess" else "",
            )  # fmt: skip
            print(method, low, high, file=sys.stderr, flush=True)
        ours = rates["asd-data preprocess"]
        for other, wanted in (
            ("gigatoken alone", "0.7"),
            ("megatron-core's writer, document by document", "8"),
        ):
            tables.add(
                "asd-data preprocess against", ("", "by time", "by CPU time", "wanted"),
                other, f"{ours[0] / rates[other][0]:.2f}", f"{ours[1] / rates[other][1]:.2f}", wanted,
            )  # fmt: skip
    print("\n".join(tables.render()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--method"]:
        method, *paths = sys.argv[2:]
        print(json.dumps(METHODS[method][0](*map(Path, paths))))
    else:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 500.0)
