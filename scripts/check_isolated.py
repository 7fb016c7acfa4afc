"""Check a package that is installed alone: `python check_isolated.py NAME`, in an environment that holds nothing else.

Every module imports, so what the package declares suffices; nothing heavy came along; and its command works.
"""

import importlib
import importlib.metadata
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NEVER = {"data": ("torch", "megatron-core"), "eval": ("torch", "megatron-core", "transformers", "numpy")}
"""By package the distributions that must not come along."""

SMALLEST = {
    "data": ["train-tokenizer", "--input", "text.jsonl", "--output-dir", "tokenizer", "--vocab-size", "340"],
    "core": ["pretrain", "--model-config", "missing.json", "--data-path", "x", "--seq-length", "8"],
    "ckpt": ["inspect", "missing"],
    "infer": ["generate", "--load", "missing", "--prompt", "x"],
    "eval": ["run", "--task", "boolq", "--task-data-path", "sample", "--scripted-answers", "answers.jsonl"],
}
"""By package the shortest command that gets beyond its arguments."""

EXPECTED_STATUS = {"data": 0, "core": 2, "ckpt": 1, "infer": 1, "eval": 0}


def main(name: str) -> None:
    """Check a package and print one line; the first thing that is wrong ends the program."""
    installed = {dist.metadata["Name"].lower() for dist in importlib.metadata.distributions()}
    heavy = [package for package in NEVER.get(name, ()) if package in installed]
    if heavy:
        sys.exit(f"ascendspeed-{name} brought {', '.join(heavy)} along")
    modules = import_all(name)
    run_smallest(name)
    print(
        f"ascendspeed-{name} alone: {len(installed)} distributions, {modules} modules import, "
        f"{SMALLEST[name][0]} works"
    )


def import_all(name: str) -> int:
    """Import every module of a package and return their number; one may lack an extra, but nothing else."""
    extras = {
        re.split(r"[<>=~!;\[ ]", requirement)[0].replace("-", "_").lower()
        for requirement in importlib.metadata.requires(f"ascendspeed-{name}") or []
        if "extra ==" in requirement
    }
    package = importlib.import_module(f"ascendspeed_{name}")
    found = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    for module in found:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0].lower() not in extras:
                sys.exit(f"{module} imports {error.name}, which ascendspeed-{name} does not declare")
    return len(found)


def run_smallest(name: str) -> None:
    """Run the package's own command on files that it can work with, or must refuse in one line."""
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


if __name__ == "__main__":
    main(sys.argv[1])
