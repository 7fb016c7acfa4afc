"""Instruction sets made on the spot: the same records, one by one and packed."""

import json
from pathlib import Path
from typing import Any

from support.commands import call
from support.corpus import make_texts

LENGTH = 96
"""Ids of a pack; no sample is longer."""


def make_records(count: int, seed: int = 3) -> list[dict[str, Any]]:
    """Questions and answers of a few words each, of quite different lengths."""
    texts = make_texts(2 * count, seed=seed)
    return [
        {
            "messages": [
                {"role": "user", "content": " ".join(question.split()[: 1 + number % 4])},
                {"role": "assistant", "content": " ".join(answer.split()[: 1 + number % 7])},
            ]
        }
        for number, (question, answer) in enumerate(zip(texts[:count], texts[count:], strict=True))
    ]


def make_instruction_sets(folder: Path, tokenizer: Path, count: int = 60) -> tuple[Path, Path]:
    """Return the prefixes of plain samples and of packs of the same."""
    source = folder / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in make_records(count)))
    template = folder / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}: {% endif %}{% endfor %}"
    )
    prefixes = folder / "plain", folder / "packs"
    for prefix, more in zip(prefixes, ((), ("--pack",)), strict=True):
        done = call(
            "asd-data", "preprocess", "--input", source, "--output-prefix", prefix, "--tokenizer-name-or-path",
            tokenizer, "--handler-name", "MessagesHandler", "--chat-template", template, "--seq-length", LENGTH, *more,
        )  # fmt: skip
        assert done.status == 0, done.stderr
    return prefixes
