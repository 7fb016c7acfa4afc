"""Programs of a model: hostile ones fail and change nothing, honest ones are judged as HumanEval's harness judges."""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_eval.sandbox.levels import open_sandbox
from ascendspeed_eval.sandbox.run import ProgramUnderTest, Sandbox, SandboxError, SandboxLevel, SandboxLimits
from ascendspeed_eval.statistics import pass_at_k
from support.commands import call
from support.honest_programs import (
    HONEST,
    NAMES_OF_THE_PROGRAM,
    OWN_OPERATORS,
    SHARED_CLASSES,
    WITH_SHARED_CLASSES,
)
from support.hostile_programs import PROGRAMS
from support.human_eval_harness import mutated, passes
from support.shared_data import BENCHMARK_FOLDERS, needs_shared_data
from support.tables import ReportTables

SUPPORT = Path(__file__).parents[1] / "support"
IS_ROOT = os.geteuid() == 0
LEVELS = (SandboxLevel.NAMESPACES, SandboxLevel.LANDLOCK)
TITLE = "Programs that attack the sandbox"
HEADER = ("kind", "what it tries", "held by", "user", "what happened")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    box = open_sandbox()
    yield box
    box.close()


def under_test(text: str, prompt: str = 'def f(x):\n    """Do it."""\n') -> ProgramUnderTest:
    """Return the prompt with a body, and its tests, from a text of `support.honest_programs`."""
    body, _, checks = text.partition("---\n")
    lines = "".join(f"    {line}\n" for line in checks.splitlines())
    return ProgramUnderTest(prompt + body.lstrip("\n"), prompt, f"def check(candidate):\n{lines}", "f")


def python(*args: object) -> "subprocess.CompletedProcess[str]":
    """Run this Python with the modules of the tests."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def attacks(level: SandboxLevel, *prefix: object) -> dict[str, Any]:
    done = python(*prefix, SUPPORT / "hostile_run.py", level, 1)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


ORDINARY, ROOT = 54321, 0
OPEN_PYTHON = "root, and a Python that all can read"
AS = {
    "whoever runs the tests": (),
    "an ordinary user": (SUPPORT / "ordinary_user.py", ORDINARY, sys.executable),
    OPEN_PYTHON: (SUPPORT / "ordinary_user.py", ROOT, sys.executable),
}


# Every level and an ordinary user are tried at once, the rest at night.
AT_NIGHT = {(SandboxLevel.LANDLOCK, "whoever runs the tests"), *((level, OPEN_PYTHON) for level in LEVELS)}


@pytest.mark.parametrize(
    ("level", "user"),
    [
        pytest.param(level, user, marks=[pytest.mark.nightly] if (level, user) in AT_NIGHT else [])
        for level in LEVELS
        for user in AS
    ],
)
def test_attacks_fail_and_change_nothing(level: SandboxLevel, user: str, report: ReportTables) -> None:
    prefix = AS[user]
    if prefix and not IS_ROOT:
        pytest.skip("needs root to become another user; the other case runs as an ordinary user already")
    done = attacks(level, *prefix)
    assert done["seen"] == []
    *rows, good = done["rows"]
    assert good["passed"], good
    assert [row["tries"] for row in rows if row["passed"]] == []
    assert len(rows) >= 60
    assert len({program.kind for program in PROGRAMS}) == 10
    who = "root" if done["user"] == 0 else "ordinary"
    report.add(f"{TITLE}: runs", ("level", "user", "programs", "passed", "seen outside", "seconds", "protections"),
               level, who, len(rows), 0, 0, f"{done['seconds']:.1f}", ", ".join(good["protections"]))  # fmt: skip
    if level is SandboxLevel.NAMESPACES:
        for program, row in zip(PROGRAMS, rows, strict=True):
            report.add(TITLE, HEADER, program.kind, program.tries, program.held_by, who, row["reason"][:60])


def agrees_with_harness(program: ProgramUnderTest) -> bool:
    return passes({"test": program.tests, "entry_point": "f"}, program.program)


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_pass(sandbox: Sandbox, name: str) -> None:
    program = under_test(HONEST[name])
    outcome = sandbox.run(program)
    assert outcome.passed, outcome
    assert agrees_with_harness(program)
    assert outcome.own_operations == 0


def test_names_that_the_prompt_lacks_come_from_the_program_and_are_counted(sandbox: Sandbox) -> None:
    outcome = sandbox.run(under_test(NAMES_OF_THE_PROGRAM))
    assert outcome.passed, outcome
    assert outcome.own_operations == 2


@pytest.mark.parametrize("name", WITH_SHARED_CLASSES)
def test_classes_of_the_prompt_are_shared(sandbox: Sandbox, name: str) -> None:
    program = under_test(WITH_SHARED_CLASSES[name], SHARED_CLASSES)
    outcome = sandbox.run(program)
    assert outcome.passed, outcome
    assert agrees_with_harness(program)
    assert outcome.own_operations == 0


@pytest.mark.parametrize("name", OWN_OPERATORS)
def test_operators_of_answers_decide_and_are_counted(sandbox: Sandbox, name: str) -> None:
    program = under_test(OWN_OPERATORS[name])
    outcome = sandbox.run(program)
    assert outcome.passed, outcome
    assert agrees_with_harness(program)
    assert outcome.own_operations > 0


def test_an_object_that_only_the_tests_have_is_named(sandbox: Sandbox) -> None:
    outcome = sandbox.run(under_test("    return 1\n---\nclass Own: pass\nassert candidate(Own()) == 1\n"))
    assert not outcome.passed
    assert "the tests hand over an object of class Own, which cannot be copied" in outcome.reason


def human_eval() -> list[dict[str, str]]:
    with gzip.open(BENCHMARK_FOLDERS["human_eval"] / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def compare_with_harness(sandbox: Sandbox, rounds: int, count: int | None) -> Counter[str]:
    """Count what harness and sandbox say of canonical solutions, all or some, with one random change."""
    draw, counts = random.Random(rounds), Counter[str]()
    problems = human_eval()
    for _ in range(rounds):
        for problem in problems if count is None else draw.sample(problems, count):
            whole = problem["prompt"] + problem["canonical_solution"]
            program = mutated(whole, problem["entry_point"], draw)
            theirs = passes(problem, program)
            ours = sandbox.run(
                ProgramUnderTest(program, problem["prompt"], problem["test"], problem["entry_point"])
            )
            counts["programs"] += 1
            counts["pass"] += theirs
            counts["pass by own operators"] += ours.passed and ours.own_operations > 0
            if theirs != ours.passed:
                counts["disagreements"] += 1
                print(problem["task_id"], theirs, ours, program, sep="\n")
    return counts


@needs_shared_data
@pytest.mark.parametrize(("rounds", "count"), [(1, 30), pytest.param(20, None, marks=pytest.mark.nightly)])
def test_verdicts_are_those_of_the_harness(
    sandbox: Sandbox, rounds: int, count: int | None, report: ReportTables
) -> None:
    counts = compare_with_harness(sandbox, rounds, count)
    columns = ("programs", "pass", "pass by own operators", "disagreements")
    report.add(
        "HumanEval: mutated solutions, against its own harness", columns, *(counts[c] for c in columns)
    )
    assert counts["disagreements"] == 0
    assert 0.2 < counts["pass"] / counts["programs"] < 0.8


@needs_shared_data
@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.nightly)])
def test_canonical_solutions_pass(sandbox: Sandbox, step: int) -> None:
    for problem in human_eval()[::step]:
        whole = problem["prompt"] + problem["canonical_solution"]
        outcome = sandbox.run(
            ProgramUnderTest(whole, problem["prompt"], problem["test"], problem["entry_point"])
        )
        assert outcome.passed, (problem["task_id"], outcome)
        assert outcome.own_operations == 0


def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    box = open_sandbox()
    write = "open('kept', 'w').write('x')" if box.level is SandboxLevel.NAMESPACES else "pass"
    assert box.run(under_test(f"    {write}\n---\nassert candidate(1) is None")).passed
    again = box.run(
        under_test("    import os\n    return os.listdir()\n---\nassert 'kept' not in candidate(1)")
    )
    assert again.passed, again
    box.close()
    assert list(tmp_path.iterdir()) == []


def test_a_sandbox_that_is_gone_starts_again(sandbox: Sandbox) -> None:
    good = under_test("    return x\n---\nassert candidate(1) == 1")
    assert sandbox.run(good).passed
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    stages = [int(n) for file in children for n in file.read_text().split()
              if b"sandbox.stage" in Path(f"/proc/{n}/cmdline").read_bytes()]  # fmt: skip
    assert stages
    for number in stages:
        os.kill(number, 9)
    assert sandbox.run(good).passed


def test_programs_run_from_many_threads(sandbox: Sandbox) -> None:
    results: list[bool] = []

    def run(number: int) -> None:
        outcome = sandbox.run(
            under_test(f"    return x * {number}\n---\nassert candidate(2) == {2 * number}")
        )
        results.append(outcome.passed)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert results == [True] * 8


PROGRAM_THAT_OPENS = """
from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.sandbox.levels import PROBE, open_sandbox
import sys
try:
    box = open_sandbox(allow_weak=sys.argv[1] == 'weak')
    print(box.level, *box.run(PROBE).protections)
except EvaluationError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("missing", "weak", "expected"),
    [
        ("namespaces", "", "landlock capabilities landlock seccomp"),
        ("mounts", "", "landlock capabilities landlock seccomp"),
        ("namespaces,landlock", "", "this machine cannot confine programs of a model (namespaces: unshare: "),
        ("seccomp", "", "this machine cannot confine programs of a model (namespaces: "),
        ("namespaces,landlock", "weak", "weak capabilities seccomp"),
        ("namespaces,landlock,seccomp", "weak", "weak capabilities"),
    ],
)
def test_less_is_used_only_as_far_as_it_may_be(missing: str, weak: str, expected: str) -> None:
    if not IS_ROOT and missing == "mounts":
        pytest.skip("an ordinary user may mount nothing outside namespaces")
    command = [SUPPORT / "fewer_calls.py", missing, sys.executable, "-c", PROGRAM_THAT_OPENS, weak]
    done = python(*command)
    said = done.stdout.strip().replace(" user", "")
    assert said.startswith(expected), done.stdout + done.stderr
    if "cannot" in expected:
        assert "docs/sandbox.md" in said
        assert "--allow-weak-sandbox" in said
    else:
        assert said == expected


def test_a_level_that_cannot_be_had_says_why() -> None:
    box = Sandbox(SandboxLevel.NAMESPACES, SandboxLimits(scratch_files=0, scratch_bytes=-1))
    with pytest.raises(SandboxError, match="scratch folder"):
        box.run(under_test("    return x\n---\nassert candidate(1) == 1"))


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
