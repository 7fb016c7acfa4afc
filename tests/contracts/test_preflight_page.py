"""docs/preflight.md shows what each check says, and a preflight ends before anything is built."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from preflight_page import PAGE, page  # noqa: E402

from support.preflight import CASES, Case, inputs, message, rows, run  # noqa: E402


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    assert PAGE.read_text(encoding="utf-8") == page(rows(tmp_path)), "run: python scripts/preflight_page.py"


def test_every_kind_of_check_has_a_case() -> None:
    assert {case.kind for case in CASES} == {
        "paths", "space", "divisibility", "devices", "data and tokenizer", "lengths", "checkpoint and config",
        "memory", "several at once",
    }  # fmt: skip


def test_a_run_without_problems_says_what_it_takes(tmp_path: Path) -> None:
    with inputs(tmp_path):
        done = run(Case("", "", ["--save", "run"]))
        assert done.status == 0, done.stderr
        said = (
            "preflight: nothing is wrong; weights, gradients and optimizer state take 0.00 GiB on each rank, with "
            "activations and messages 0.00; a checkpoint takes 0.00 GB"
        )
        assert said in done.stderr
        assert not Path("run").exists()


def test_several_problems_are_one_line(tmp_path: Path) -> None:
    with inputs(tmp_path):
        done = run(next(case for case in CASES if case.wrong == "layout, length and data"))
    parts = message(done).split("; also: ")
    assert len(parts) == 3
    assert "tensor_model_parallel_size=3" in parts[0]
    assert "seq_length=4096" in parts[1]
    assert "nowhere" in parts[2]
