"""The library example of the README runs with names that the package itself exports."""

import shutil
import subprocess
import sys
from pathlib import Path

from support.commands import environment

README = Path(__file__).parents[2] / "packages" / "ascendspeed-data" / "README.md"


def test_the_library_example_tokenizes_a_corpus(tmp_path: Path, corpus: Path, tokenizer_folder: Path) -> None:
    (program,) = [block.split("```")[0] for block in README.read_text().split("```python\n")[1:]]
    shutil.copy(corpus, tmp_path / "corpus.jsonl")
    shutil.copytree(tokenizer_folder, tmp_path / "my-tokenizer")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert (tmp_path / "from-python_text_document.idx").is_file()
