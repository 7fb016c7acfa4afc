"""Run inside a fresh environment that holds one package: its command works, and nothing heavy came along."""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path

NEVER = {"data": ("torch", "megatron-core"), "eval": ("torch", "megatron-core", "transformers", "numpy")}
SMALLEST = {
    "data": ["train-tokenizer", "--input", "text.jsonl", "--output-dir", "tokenizer", "--vocab-size", "340"],
    "core": ["pretrain", "--model-config", "missing.json", "--data-path", "x", "--seq-length", "8"],
    "ckpt": ["inspect", "missing"],
    "infer": ["generate", "--load", "missing", "--prompt", "x"],
    "eval": ["run", "--task", "boolq", "--task-data-path", "sample", "--scripted-answers", "answers.jsonl"],
}
EXPECTED_STATUS = {"data": 0, "core": 2, "ckpt": 1, "infer": 1, "eval": 0}


def main(name: str) -> None:
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    heavy = [package for package in NEVER.get(name, ()) if package in installed]
    if heavy:
        sys.exit(f"ascendspeed-{name} brought {', '.join(heavy)} along")
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            json.dumps({"text": f"{i} the quick brown fox jumps over the lazy dog {i * 37}"})
            for i in range(2000)
        ]
        (Path(folder) / "text.jsonl").write_text("\n".join(lines))
        (Path(folder) / "answers.jsonl").write_text('{"contains": "", "logprobs": {" Yes": -1, " No": -2}}\n')
        command = [str(Path(sys.executable).parent / f"asd-{name}"), *SMALLEST[name]]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != EXPECTED_STATUS[name] or "Traceback" in done.stderr:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    print(f"ascendspeed-{name} alone: {len(installed)} packages, {' '.join(SMALLEST[name][:1])} works")


if __name__ == "__main__":
    main(sys.argv[1])
