"""`asd-core compare-loss`: deviations by iteration, a verdict, a picture."""

import json
from pathlib import Path

import pytest

from support.commands import call


def write_run(folder: Path, losses: list[float | None]) -> Path:
    folder.mkdir()
    lines = [{"iteration": number, "lm_loss": loss} for number, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "a", [4.0, 2.0, 1.0]),
        write_run(tmp_path / "b", [4.0, 2.002, 1.0, 0.5]),
        write_run(tmp_path / "c", [None, 2.0, 1.5]),
    ]


def test_deviations(runs: list[Path], tmp_path: Path) -> None:
    done = call("asd-core", "compare-loss", *runs, "--json", "--picture", tmp_path / "curves.png")
    assert done.status == 0, done.stderr
    b, c = (json.loads(line) for line in done.stdout.splitlines())
    assert (b["num_iterations"], b["only_in_one"], b["at_iteration"]) == (3, 1, 2)
    assert b["largest"] == pytest.approx(0.001)
    assert b["mean"] == pytest.approx(0.001 / 3)
    assert (c["num_iterations"], c["largest"], c["at_iteration"]) == (2, 0.5, 3)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    said = call("asd-core", "compare-loss", *runs)
    assert "largest relative deviation 1.00e-03 (iteration 2), mean 3.33e-04" in said.stdout
    assert "1 iterations are in one of the two runs only" in said.stderr


def test_the_verdict(runs: list[Path]) -> None:
    assert call("asd-core", "compare-loss", *runs[:2], "--tolerance", 0.01).status == 0
    done = call("asd-core", "compare-loss", *runs, "--tolerance", 0.01)
    assert done.status == 1
    assert "c deviates by 5.00e-01 at iteration 3, more than tolerance=0.01" in done.complaint


def test_bad_input(runs: list[Path], tmp_path: Path) -> None:
    assert "at least one other" in call("asd-core", "compare-loss", runs[0]).complaint
    assert "give the --save folder of a run" in call("asd-core", "compare-loss", runs[0], tmp_path).complaint
    late = write_run(tmp_path / "late", [None, None, None, 1.0])
    assert "no iteration in common" in call("asd-core", "compare-loss", runs[0], late).complaint
    empty = write_run(tmp_path / "empty", [])
    assert "holds no iteration yet" in call("asd-core", "compare-loss", runs[0], empty).complaint
