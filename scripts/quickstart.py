"""The main job, from text to a benchmark score, with the public commands and nothing from outside.

The text is what every Python has: the source of its own standard library.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

VOCABULARY = 4096
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ_LENGTH, GLOBAL_BATCH_SIZE = 256, 16
PROMPT = "def read_file(path):\n    "
NATS_BELOW_UNIGRAM = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart-output"))
    parser.add_argument("--train-iters", type=int, default=300)
    parser.add_argument("--max-text-bytes", type=int, default=16_000_000)
    args = parser.parse_args()
    job = Quickstart(args.output_dir, args.train_iters, args.max_text_bytes)
    job.run()


class Quickstart:
    """Each step is one public command; what it made goes into the summary."""

    def __init__(self, folder: Path, train_iters: int, max_text_bytes: int) -> None:
        self.folder, self.train_iters, self.max_text_bytes = folder, train_iters, max_text_bytes
        self.rows: list[tuple[str, str, str]] = []
        self.started = time.perf_counter()
        _fresh_folder(folder)

    def run(self) -> None:
        self.write_text()
        self.tokenize()
        self.pretrain()
        self.resume()
        self.convert()
        self.generate()
        self.evaluate()
        self.summary()

    def write_text(self) -> None:
        import pyarrow
        import pyarrow.parquet

        path = self.folder / "stdlib.parquet"
        texts = list(standard_library(self.max_text_bytes))
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path)
        size = sum(len(text.encode()) for text in texts)
        self.note("text", path, f"{len(texts):,} files, {size / 1e6:.1f} MB of Python source")

    def tokenize(self) -> None:
        text, tokenizer, prefix = (
            self.folder / "stdlib.parquet",
            self.folder / "tokenizer",
            self.folder / "stdlib",
        )
        command(
            "asd-data", "train-tokenizer", "--input", text, "--output-dir", tokenizer, "--vocab-size", VOCABULARY,
            "--sample-bytes", 4_000_000,
        )  # fmt: skip
        self.note("tokenizer", tokenizer, f"{VOCABULARY:,} pieces")
        command(
            "asd-data", "preprocess", "--input", text, "--output-prefix", prefix,
            "--tokenizer-name-or-path", tokenizer, "--workers", 2,
        )  # fmt: skip
        manifest = read_json(self.folder / "stdlib_text_document.manifest.json")
        self.entropy = float(manifest["unigram_entropy_nats"])
        self.note(
            "dataset",
            self.folder / "stdlib_text_document.bin",
            f"{manifest['num_documents']:,} documents, {manifest['num_tokens']:,} tokens, unigram entropy "
            f"{self.entropy:.3f} nats per token",
        )

    def train_arguments(self) -> list[object]:
        return [
            "--data-path", self.folder / "stdlib_text_document", "--tokenizer-name-or-path", self.folder / "tokenizer",
            "--seq-length", SEQ_LENGTH, "--micro-batch-size", GLOBAL_BATCH_SIZE,
            "--global-batch-size", GLOBAL_BATCH_SIZE, "--train-iters", self.train_iters, "--lr", 3e-3,
            "--min-lr", 3e-4, "--lr-decay-style", "cosine", "--lr-warmup-iters", max(self.train_iters // 15, 1),
            "--save", self.folder / "run", "--log-interval", max(self.train_iters // 15, 1),
        ]  # fmt: skip

    def pretrain(self) -> None:
        config = self.folder / "model.json"
        config.write_text(json.dumps(MODEL, indent=2) + "\n")
        command(
            "asd-core", "pretrain", "--model-config", config, *self.train_arguments(),
            "--tensor-model-parallel-size", 2, "--nproc-per-node", 2, "--exit-interval", self.train_iters // 2,
        )  # fmt: skip
        records = self.records()
        rate = sum(r["tokens_per_second"] for r in records[1:]) / len(records[1:])
        self.note("training, tp2", self.folder / "run", f"{len(records)} iterations, {rate:,.0f} tokens/s")

    def resume(self) -> None:
        before = mean_loss(self.records()[-10:])
        command(
            "asd-core", "pretrain", "--load", self.folder / "run", *self.train_arguments(),
            "--pipeline-model-parallel-size", 2, "--nproc-per-node", 2, "--micro-batch-size", GLOBAL_BATCH_SIZE // 4,
        )  # fmt: skip
        records = self.records()
        first = mean_loss(records[self.train_iters // 2 :][:10])
        last = mean_loss(records[-10:])
        print(
            f"the loss goes on where it was: {before:.3f} nats (10 iterations before the stop), {first:.3f} (10 after)",
            flush=True,
        )
        below = self.entropy - last
        if self.train_iters >= 300 and below < NATS_BELOW_UNIGRAM:
            sys.exit(f"quickstart: loss {last:.3f} is only {below:.3f} nats below the unigram entropy")
        self.note(
            "resumed at pp2",
            self.folder / "run" / "loss.png",
            f"loss {last:.3f} nats per token, {below:.3f} below unigram",
        )

    def convert(self) -> None:
        target = self.folder / "model-hf"
        printed = command(
            "asd-ckpt", "convert", "--input-model-dir", self.folder / "run", "--output-model-dir", target,
            "--to", "huggingface",
        )  # fmt: skip
        logits = next(line for line in printed.splitlines() if line.startswith("logits"))
        self.note("Hugging Face folder", target, logits.removeprefix("logits: "))

    def generate(self) -> None:
        printed = command(
            "asd-infer", "generate", "--load", self.folder / "model-hf", "--prompt", PROMPT, "--max-new-tokens", 40,
            "--json",
        )  # fmt: skip
        (self.folder / "completion.json").write_text(printed)
        completion = json.loads(printed)
        print(completion["prompt"] + completion["text"], flush=True)
        self.note("completion", self.folder / "completion.json", f"{len(completion['token_ids'])} tokens")

    def evaluate(self) -> None:
        output = self.folder / "boolq"
        command(
            "asd-eval", "run", "--task", "boolq", "--task-data-path", "sample", "--load", self.folder / "model-hf",
            "--output-dir", output,
        )  # fmt: skip
        task = read_json(output / "results.json")["tasks"]["boolq"]
        self.note(
            "BoolQ sample (toy model)",
            output / "report.md",
            f"accuracy {task['score']:.3f} ± {task['stderr']:.3f} on {task['num_samples']} samples; always yes gives "
            f"{task['baselines']['majority']:.3f}",
        )

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]

    def note(self, what: str, where: Path, figure: str) -> None:
        self.rows.append((what, str(where), figure))

    def summary(self) -> None:
        self.rows.append(("all of it", str(self.folder), f"{time.perf_counter() - self.started:.0f} s"))
        table = [("made", "where", "figures"), *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        print()
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def standard_library(max_bytes: int) -> Iterator[str]:
    """Yield the standard library's source files in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    taken = 0
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if taken + len(text) > max_bytes:
            return
        taken += len(text)
        yield text


def command(*args: object) -> str:
    """Echo a command, run it, and return what it printed on stdout."""
    words = [str(arg) for arg in args]
    print(f"\n$ {shlex.join(words)}", flush=True)
    executable = Path(sys.executable).parent / words[0]
    done = subprocess.run([str(executable), *words[1:]], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"quickstart: {words[0]} ended with status {done.returncode}")
    return done.stdout


def mean_loss(records: list[dict[str, Any]]) -> float:
    return float(sum(record["lm_loss"] for record in records) / len(records))


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _fresh_folder(folder: Path) -> None:
    """Make an empty folder; an earlier one is replaced only if this script made it."""
    marker = folder / ".quickstart"
    if folder.exists():
        if not marker.is_file():
            sys.exit(
                f"quickstart: {folder} exists and was not made by the quick start; give --output-dir another one"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    marker.touch()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
