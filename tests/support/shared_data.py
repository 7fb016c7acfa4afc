"""Real files that are too large or not licensed to live in the repository; tests that need them say so.

They are looked for in the folder that ASCENDSPEED_SHARED_DATA names, by default `shared/data` beside the repository.
"""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = Path(os.environ.get("ASCENDSPEED_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
STORIES = SHARED_DATA / "models" / "stories260K-hf"
TOKENIZERS = SHARED_DATA / "tokenizers"
WIKIPEDIA = SHARED_DATA / "pretrain" / "wikipedia_en.jsonl"

needs_shared_data = pytest.mark.skipif(
    not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is not there; name it with ASCENDSPEED_SHARED_DATA"
)

BENCHMARKS = SHARED_DATA / "benchmarks"
BENCHMARK_FOLDERS = {
    "boolq": BENCHMARKS / "BoolQ",
    "mmlu": BENCHMARKS / "MMLU",
    "gsm8k": BENCHMARKS / "GSM8K",
    "human_eval": BENCHMARKS / "HumanEval",
    "agieval": BENCHMARKS / "AGIEval",
    "bbh": BENCHMARKS / "BBH",
    "ceval": BENCHMARKS / "C-Eval",
}
