"""Programs that a model might write: each attack fails, changes nothing, and is scored as a failure."""

import tempfile
import time
from pathlib import Path

import pytest

from ascendspeed_eval.sandbox.run import SandboxLimits, run_program
from ascendspeed_eval.statistics import pass_at_k
from support.commands import call
from support.tables import ReportTables

ATTACKS = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "processes without fork": "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'pass'], check=True)",
    "infinite loop": "while True:\n    pass",
    "sleeps for ever": "import time\ntime.sleep(1000)",
    "ignores signals and loops": (
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except Exception: pass\n"
        "while True: pass"
    ),
    "100 GB": "block = bytearray(100 * 10**9)",
    "memory bit by bit": "blocks = []\nwhile True:\n    blocks.append(bytearray(10**8))",
    "reads the environment": "import os\nassert os.environ.get('SECRET_OF_THE_TEST')",
    "reads the parent's environment": "import os\nassert open(f'/proc/{os.getppid()}/environ').read()",
    "reads a file of the user": "open({victim!r} + '/kept.txt').read()",
    "deletes files": "import shutil\nshutil.rmtree({victim!r})",
    "writes elsewhere": "open({victim!r} + '/new.txt', 'w').write('x')",
    "a link out of the scratch folder": "import os\nos.symlink({victim!r}, 'way')\nopen('way/new.txt', 'w').write('x')",
    "kills the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kills everything": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "endless output": "while True:\n    print('x' * 10000)",
    "endless errors": "import sys\nwhile True:\n    sys.stderr.write('x' * 10000)",
    "fills the disk": "with open('big', 'wb') as file:\n    while True:\n        file.write(bytes(10**6))",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 1), 1)",
    "reads stdin": "assert input()",
    "inherited descriptors": (
        "import os\nfor n in range(3, 64):\n    try: os.read(n, 1)\n    except OSError: continue\n    break\nelse:\n"
        "    raise OSError('none')"
    ),
    "raises its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "ends early with success": "import sys\nsys.exit(0)",
    "ends at once with success": "import os\nos._exit(0)",
    "replaces itself": "import os\nos.execv('/bin/true', ['true'])",
    "traces the parent": "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "not Python": "def f(:\n",
    "cuts no character": "x = '\ud800'\nassert False",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail_and_change_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: ReportTables
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_TEST", "secret")
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o777)
    (victim / "kept.txt").write_text("kept")
    victim.chmod(0o777)
    started = time.monotonic()
    outcome = run_program(ATTACKS[name].replace("{victim!r}", repr(str(victim))), SandboxLimits(seconds=1.5))
    seconds = time.monotonic() - started
    assert not outcome.passed
    assert seconds < 10
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"kept.txt": "kept"}
    report.add("HumanEval: attacks", ("attack", "what happened"), name, outcome.reason)


def test_honest_programs_pass() -> None:
    program = (
        "import math, re, collections, itertools, hashlib, random, datetime, threading, typing, json, bisect\n"
        "thread = threading.Thread(target=lambda: None)\nthread.start()\nthread.join()\n"
        "open('scratch.txt', 'w').write('x')\nprint(open('scratch.txt').read())\nassert math.sqrt(4) == 2"
    )
    before = set(Path(tempfile.gettempdir()).glob("asd-eval-*"))
    outcome = run_program(program)
    assert outcome.passed, outcome
    assert set(Path(tempfile.gettempdir()).glob("asd-eval-*")) == before


def test_pass_at_k_has_known_values() -> None:
    # Chen et al. (2021), equation 1, by counting: 2 of 5 pass; of 10 pairs, 3 have none of them.
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    assert pass_at_k(5, 0, 5) == 0.0
    assert pass_at_k(5, 4, 2) == 1.0


def test_code_runs_only_if_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    done = call(
        "asd-eval", "run", "--task", "human_eval", "--task-data-path", tmp_path, "--scripted-answers",
        tmp_path / "a.jsonl",
    )  # fmt: skip
    assert done.status == 2
    assert "--allow-code-execution" in done.complaint
