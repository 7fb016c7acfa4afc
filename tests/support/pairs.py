"""Pairs for preference tuning made on the spot."""

import json
from pathlib import Path

from support.commands import call
from support.corpus import make_texts

LENGTH = 64
"""Ids of a row; no answer with its prompt is longer."""


def make_pair_records(count: int, seed: int = 4) -> list[dict[str, str]]:
    """Questions with two answers of quite different lengths."""
    texts = make_texts(3 * count, seed=seed)
    parts = zip(texts[:count], texts[count : 2 * count], texts[2 * count :], strict=True)
    return [
        {
            "prompt": " ".join(question.split()[: 1 + number % 4]) + ":",
            "chosen": " " + " ".join(good.split()[: 1 + number % 7]),
            "rejected": " " + " ".join(bad.split()[: 1 + number % 5]) + " so",
        }
        for number, (question, good, bad) in enumerate(parts)
    ]


def make_pairs(folder: Path, tokenizer: Path, count: int = 40) -> Path:
    """Return the prefix of pairs."""
    source, prefix = folder / "pairs.jsonl", folder / "pairs"
    source.write_text("".join(json.dumps(record) + "\n" for record in make_pair_records(count)))
    done = call(
        "asd-data", "preprocess", "--input", source, "--output-prefix", prefix, "--tokenizer-name-or-path", tokenizer,
        "--handler-name", "TextPairHandler",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    return prefix
