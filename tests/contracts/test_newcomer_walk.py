"""docs/newcomer.md shows the steps of the README, as they stand; test_documents.py runs them."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from newcomer_walk import PAGE, steps  # noqa: E402


def test_the_transcript_has_the_steps_of_the_readme() -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == len(steps())
    for block, step in zip(blocks, steps(), strict=True):
        first, *rest = step.split("\n")
        shown = "\n".join([f"$ {first}", *(f"> {line}" for line in rest)])
        assert block.startswith(shown + "\n"), step


def test_the_steps_cover_what_a_newcomer_needs() -> None:
    commands = [step.split()[0:2] for step in steps() if step.startswith("asd-")]
    assert commands == [
        ["asd-data", "train-tokenizer"], ["asd-data", "preprocess"], ["asd-core", "pretrain"],
        ["asd-core", "finetune"], ["asd-eval", "run"],
    ]  # fmt: skip
    assert any("asd-infer chat" in step for step in steps())
