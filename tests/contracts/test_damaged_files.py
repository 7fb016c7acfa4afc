"""Files are read in one place, and no damage ends a command with a traceback, a crash or an endless run.

`python tests/support/damaged_world.py SEED COUNT [FIRST]` repeats what a test here reports.
"""

import ast
import datetime
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from support.commands import environment
from support.damaged_world import DamagedWorld, try_one
from support.tables import ReportTables

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "damaged_world.py"
SEED, SAMPLE = 1, 40
HEADER = ("seed", "tried", "refused", "equal", "accepted", "wrong")
READERS = {
    "json.load", "json.loads", "tomllib.load", "tomllib.loads", "yaml.load", "yaml.safe_load",
    "np.fromfile", "np.load", "np.memmap", "torch.load", "pickle.load", "pickle.loads", "safe_open", "load_file",
}  # fmt: skip
"""Calls that decode or parse what a file holds; a method `read_text` of whatever object."""

ALLOWED = {
    "ascendspeed_data/small_files.py": "the place itself",
    "ascendspeed_eval/small_files.py": "the place itself of a package that imports no other",
    "ascendspeed_data/command_line/other_programs.py": "a table inside the package",
    "ascendspeed_eval/other_programs.py": "a table inside the package",
    "ascendspeed_data/indexed.py": "tokens are mapped; sizes are checked before",
    "ascendspeed_data/preprocessing/packing.py": "its own scratch files",
    "ascendspeed_data/reading/records.py": "training records, whose errors name their lines",
    "ascendspeed_data/conversation.py": "JSON text inside training records, whose errors name their lines",
    "ascendspeed_data/fast_tokenizer.py": "JSON that a library made in this process",
    "ascendspeed_data/tokenizer_config.py": "files of tokenizers, whose errors name the key",
    "ascendspeed_data/json_tokenizer.py": "a tokenizer.json that the tokenizers library has read",
    "ascendspeed_data/chat_template.py": "templates, whose errors name their lines",
    "ascendspeed_data/template_values.py": "the value of an option, whose errors name it",
    "ascendspeed_core/data/build_index.py": "what the process above wrote on stdin",
    "ascendspeed_core/data/sample_index.py": "the cache, which is built again when it is damaged",
    "ascendspeed_core/device.py": "what the installer of CANN wrote, searched for its version",
    "ascendspeed_core/kernels/cpp_library.py": "what the system says of the processor",
    "ascendspeed_core/observability/watchdog.py": "what another rank put into the store",
    "ascendspeed_core/weights/files/safetensors_files.py": "headers inside weight files",
    "ascendspeed_infer/engine/control_channel.py": "what rank 0 sent",
    "ascendspeed_infer/tool_calls.py": "answers of a model; what is no JSON stays text",
    "ascendspeed_infer/serve/bodies.py": "bodies of requests, which pydantic models check",
    "ascendspeed_infer/serve/chat_page.py": "the page inside the package",
    "ascendspeed_eval/server/answers.py": "what a server answered, which pydantic models check",
    "ascendspeed_eval/sandbox/run.py": "what the sandbox's own processes say",
    "ascendspeed_eval/sandbox/stage.py": "what the process above sent, and children in /proc",
    "ascendspeed_eval/sandbox/values.py": "messages between tests and program, checked value by value",
    "ascendspeed_eval/tasks/custom.py": "YAML, of text that was read in the place itself",
}


def readers_in(path: Path) -> list[int]:
    """Lines of a file that call a reader."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            is_method = node.func.attr == "read_text" and owner != "small_files"
            if is_method or f"{owner}.{node.func.attr}" in READERS:
                found.append(node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in READERS:
            found.append(node.lineno)
    return found


def test_files_are_read_in_one_place() -> None:
    found = {
        path.relative_to(source).as_posix(): lines
        for source in ROOT.glob("packages/*/src")
        for path in source.rglob("*.py")
        if (lines := readers_in(path))
    }
    assert {name: lines for name, lines in found.items() if name not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "a file that reads nothing any more needs no exception"


def test_readers_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text("import json\nx = json.loads(p.read_text())\ny = read_text(p)\nz = torch.load(p)\n")
    assert readers_in(path) == [2, 4, 2]


def test_damaged_files(tmp_path: Path, report: ReportTables) -> None:
    """A sample; `test_damaged_files_at_random` tries many."""
    world = DamagedWorld(tmp_path / "world")
    trials = [try_one(world, SEED, number) for number in range(SAMPLE)]
    outcomes = Counter("wrong" if trial.is_wrong else trial.outcome for trial in trials)
    report.add("damaged files", HEADER, SEED, SAMPLE, *(outcomes[name] for name in HEADER[2:]))
    assert [trial for trial in trials if trial.is_wrong] == []


@pytest.mark.nightly
def test_damaged_files_at_random(report: ReportTables) -> None:
    """In a process of its own, which a crash would end; the seed is another one every day."""
    seed, count = int(datetime.datetime.now(tz=datetime.UTC).strftime("%Y%m%d")), 3000
    print(f"seed {seed}")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(seed), str(count)],
        env=environment(PYTHONPATH=str(ROOT / "tests")),
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, (seed, lines, done.stderr[-2000:])
    report.add("damaged files", HEADER, seed, count, *(lines[-1].get(name, 0) for name in HEADER[2:]))
