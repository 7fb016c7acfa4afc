"""The library example of the README evaluates an object of its own with names that the package itself exports."""

import json
import subprocess
import sys
from pathlib import Path

from support.commands import environment

README = Path(__file__).parents[2] / "packages" / "ascendspeed-eval" / "README.md"


def test_the_library_example_evaluates_a_model(tmp_path: Path) -> None:
    (program,) = [block.split("```")[0] for block in README.read_text().split("```python\n")[1:]]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "shortest" / "results.json").read_text())
    assert float(done.stdout) == results["tasks"]["boolq"]["score"]
