"""`benchmarks/device.py`: it runs small on a CPU, names what fails and goes on, and fills a page."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.commands import environment

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "device.py"
FIGURES = ROOT / "benchmarks" / "results" / "device.json"
PAGE = ROOT / "docs" / "accelerators.md"
BEGIN, END = "<!-- figures of benchmarks/device.py -->\n\n", "\n\n<!-- end of the figures -->"


@pytest.fixture
def on_device() -> Iterator[None]:
    """Makes the script's folder importable."""
    sys.path.insert(0, str(SCRIPT.parent))
    yield
    sys.path.remove(str(SCRIPT.parent))


def run_script(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_runs_on_a_cpu(tmp_path: Path) -> None:
    wanted = (
        "kernel grouped_product: reference", "kernel token_permutation: reference", "kernel rotary: npu",
        "kernel loss_from_hidden", "loss at", "grouped product", "kernel adamw", "packed samples float32",
        "float16 with a loss", "continued texts: llama float32", "bandwidth", "7B, 1 texts", "7B: ours",
    )  # fmt: skip
    done = run_script("--device", "cpu", "--alone", "--json", tmp_path / "out.json", "--match", *wanted)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    statuses = {one["name"]: one["status"] for one in report["items"]}
    assert len(statuses) == len(wanted)
    assert statuses.pop("kernel rotary: npu") == "left out"
    assert set(statuses.values()) == {"passed"}
    assert "On a device it would have run" in done.stdout
    assert "7B: Shape(hidden=4096" in done.stdout


@pytest.mark.nightly
def test_goes_on_after_what_fails(on_device: None) -> None:
    from on_device.plan import Item, Outcome
    from on_device.runner import run_all

    names = ("pass_", "fail", "die", "hang", "pass_")
    chosen = [
        # A limit of less than nothing: this one hangs.
        Item("correct", name, "support.device_items", name, (), -19.0 if name == "hang" else 1.0)
        for name in names
    ]
    told: list[Outcome] = []
    about, done = run_all(chosen, "cpu", 2.0, {}, lambda _, outcome: told.append(outcome))
    assert about["device"] == "cpu"
    assert [outcome.status for _, outcome in done] == ["passed", "failed", "failed", "failed", "passed"]
    assert told == [outcome for _, outcome in done]
    assert told[1].error == "RuntimeError: the device said no"
    assert any("device_items.py" in line for line in told[1].trace)
    assert told[2].error == "its process ended with status 3"
    assert told[3].error.startswith("no answer after")


def test_leaves_out_what_no_longer_fits(on_device: None) -> None:
    from on_device.plan import Item
    from on_device.runner import run_all

    item = Item("correct", "late", "support.device_items", "pass_")
    _, ((_, outcome),) = run_all([item], "cpu", 0.0, {}, lambda *_: None)
    assert outcome.status == "left out"
    assert "it takes about 1" in outcome.error


def test_cases_are_those_of_the_plan(on_device: None) -> None:
    from on_device import decoding_checks, training_checks
    from on_device.plan import DECODING_CASES, TRAINING_CASES

    assert tuple(training_checks.cases()) == TRAINING_CASES
    assert tuple(decoding_checks.cases()) == DECODING_CASES


def test_the_page_has_the_figures() -> None:
    table = run_script("--table", FIGURES).stdout.strip()
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)] == table
