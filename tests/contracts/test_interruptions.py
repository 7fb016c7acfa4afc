"""Ctrl-C at a random moment: one line says what is kept, the status is 130, and going on gives the same result."""

import json
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.training.checkpoint import saved_iterations
from ascendspeed_core.weights import open_weights
from support.commands import Finished, RunningCommand, call, run_command
from support.models import save_hugging_face, tiny_config
from support.tables import ReportTables

HEADER = ("command", "tried", "interrupted", "ended before", "tracebacks", "other results")


@dataclass(frozen=True)
class Interrupted:
    """A command that is interrupted.

    Attributes:
        args: it writes into OUT.
        go_on: what is added to go on.
        result: what it leaves in a folder, for comparison.
        kept: what the line of an interruption must say, one of these.
        is_resumed: whether the command goes on in its folder; generation is only compared.
        reached: the share of the work that is done, if its folder tells; else the time says when to interrupt.
    """

    args: list[object]
    go_on: list[object]
    result: Callable[[Path, Finished], Any]
    kept: tuple[str, ...]
    is_resumed: bool = True
    reached: Callable[[Path], float] | None = None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    save_hugging_face(tiny_config(vocab_size=400), folder, tokenizer=tokenizer_folder)
    return folder


@pytest.fixture(scope="module")
def commands(
    tmp_path_factory: pytest.TempPathFactory, model: Path, dataset: Path, corpus: Path, tokenizer_folder: Path
) -> dict[str, Interrupted]:
    made = tmp_path_factory.mktemp("inputs")
    (made / "large.jsonl").write_text(corpus.read_text() * 60)
    prompts = [json.dumps({"prompt": f"text {number}"}) + "\n" for number in range(60)]
    (made / "prompts.jsonl").write_text("".join(prompts))
    return {
        "pretrain": Interrupted(
            [
                "asd-core", "pretrain", "--load", model, "--data-path", dataset, "--seq-length", 32,
                "--global-batch-size", 8, "--train-iters", 60, "--save", "OUT", "--data-cache-path", made / "cache",
                "--device", "cpu",
            ],
            ["--auto-resume"],
            _run_of,
            ("which was saved in", "holds no checkpoint yet; run the same command again", "holds iteration"),
            reached=lambda out: _lines_of(out / "metrics.jsonl") / 60,
        ),
        "preprocess": Interrupted(
            [
                "asd-data", "preprocess", "--input", made / "large.jsonl", "--output-prefix", "OUT/set",
                "--tokenizer-name-or-path", tokenizer_folder, "--workers", 2, "--shard-size", 16,
            ],
            [],
            lambda out, done: [(out / f"set_text_document.{kind}").read_bytes() for kind in ("bin", "idx")],
            ("are finished; run the same command again", "nothing is kept", "run the same command again"),
        ),
        "convert": Interrupted(
            ["asd-ckpt", "convert", "--load", model, "--save", "OUT/native", "--workers", 2],
            [],
            lambda out, done: _weights_of(out / "native"),
            ("was not written; run the same command again", "is written and complete", "run the same command again"),
        ),
        "generate": Interrupted(
            [
                "asd-infer", "generate", "--load", model, "--prompt-file", made / "prompts.jsonl", "--max-new-tokens",
                48, "--ignore-eos", "--batch-size", 2, "--device", "cpu", "--json",
            ],
            [],
            lambda out, done: done.stdout.splitlines(),
            ("of 60 completions were printed", "run the same command again"),
            is_resumed=False,
        ),
        "eval": Interrupted(
            [
                "asd-eval", "run", "--task", "boolq", "--task-data-path", "sample", "--load", model, "--output-dir",
                "OUT", "--device", "cpu", "--micro-batch-size", 1,
            ],
            [],
            lambda out, done: [(out / name).read_text() for name in ("samples.jsonl", "results.json")],
            ("finished samples; the same command goes on", "run the same command again"),
            reached=lambda out: _lines_of(out / "samples.jsonl") / 40,
        ),
    }  # fmt: skip


def _run_of(out: Path, done: Finished) -> Any:
    keys = ("iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_samples")
    return [tuple(row[key] for key in keys) for row in read_metrics(out / "metrics.jsonl")], _weights_of(out)


def _weights_of(folder: Path) -> dict[str, list[float]]:
    source = open_weights(folder)
    return {name: source.read(name).flatten().tolist() for name in source.tensors()}


def wait_for(condition: Callable[[], bool], running: RunningCommand) -> None:
    while not condition():
        assert running.poll() is None, running.stderr
        time.sleep(0.005)


def _lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def interrupt(
    command: Interrupted, out: Path, share: float, seconds: float, again_after: float | None = None
) -> Finished:
    """Run a command and press Ctrl-C in the midst: its whole process group gets SIGINT, as from a terminal.

    Args:
        command: what is run.
        out: its folder.
        share: of its work, or of its time, that is done then.
        seconds: that it takes.
        again_after: seconds from then to a second Ctrl-C, if there is one.
    """
    running = RunningCommand(*_with_output(command.args, out))
    if command.reached is None or share < 0.1:
        time.sleep(share * seconds)
    else:
        while running.poll() is None and command.reached(out) < share:
            time.sleep(0.002)
    if running.poll() is None:
        running.send_group_signal(signal.SIGINT)
    if again_after is not None:
        time.sleep(again_after)
        running.send_group_signal(signal.SIGINT)
    return running.finish(timeout=120)


def _with_output(args: list[object], out: Path) -> list[object]:
    return [str(arg).replace("OUT", str(out)) for arg in args]


def try_moments(
    command: Interrupted, name: str, folder: Path, times: int, seed: int, report: ReportTables
) -> None:
    draw = random.Random(seed)
    (folder / "whole").mkdir()
    started = time.monotonic()
    whole = run_command(*_with_output(command.args, folder / "whole"))
    assert whole.status == 0, whole.stderr
    expected = command.result(folder / "whole", whole)
    if times > 1:
        # Once more for the time: the first run makes indices that later ones find.
        (folder / "again").mkdir()
        started = time.monotonic()
        run_command(*_with_output(command.args, folder / "again"))
    seconds = time.monotonic() - started
    early = 0
    for number in range(times):
        out = folder / f"out{number}"
        out.mkdir()
        done = interrupt(command, out, draw.uniform(0.02, 0.95), seconds)
        assert "Traceback" not in done.stderr, done.stderr
        assert "Exception ignored" not in done.stderr, done.stderr
        if done.status == 0:
            early += 1
        else:
            assert done.status == 130, (done.status, done.stderr)
            assert any(kept in done.complaint for kept in command.kept), done.stderr
            assert sum("error: " in line for line in done.stderr.splitlines()) == 1, done.stderr
        is_complete = done.status == 130 and "is written and complete" in done.complaint
        if command.is_resumed and is_complete:
            assert command.result(out, done) == expected
        elif command.is_resumed:
            again = run_command(*_with_output(command.args, out), *(command.go_on if done.status else []))
            if done.status == 0:
                again = done
            assert again.status == 0, again.stderr
            assert command.result(out, again) == expected
        else:
            printed = command.result(out, done)
            assert printed == expected[: len(printed)]
        shutil.rmtree(out)
    report.add("Interrupted by Ctrl-C at random moments", HEADER, name, times, times - early, early, 0, 0)


def test_ctrl_c(commands: dict[str, Interrupted], tmp_path: Path, report: ReportTables) -> None:
    """One command at one moment; at night all of them at ten."""
    try_moments(commands["eval"], "eval", tmp_path, 1, 7, report)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["pretrain", "preprocess", "convert", "generate", "eval"])
def test_ctrl_c_ten_times(
    commands: dict[str, Interrupted], tmp_path: Path, report: ReportTables, name: str
) -> None:
    try_moments(commands[name], name, tmp_path, 10, random.randrange(1 << 30), report)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["pretrain", "generate", "eval"])
def test_ctrl_c_of_two_processes(
    commands: dict[str, Interrupted], tmp_path: Path, report: ReportTables, name: str
) -> None:
    one = commands[name]
    two = replace(one, args=[*one.args, "--nproc-per-node", 2, "--tensor-model-parallel-size", 2])
    if name == "generate":
        two = replace(two, args=[*two.args, "--max-new-tokens", 6])
    two = replace(two, kept=(*one.kept, "all 2 processes with it;"))
    try_moments(two, f"{name}, two processes", tmp_path, 3, random.randrange(1 << 30), report)


def press_twice(command: Interrupted, folder: Path, times: int, seed: int) -> int:
    """Press Ctrl-C twice, up to half a second apart; return how often that ended the command.

    A second one that meets a process at its very end kills it, without a line.
    """
    draw, ended = random.Random(seed), 0
    (folder / "whole").mkdir(parents=True)
    started = time.monotonic()
    whole = run_command(*_with_output(command.args, folder / "whole"))
    seconds = time.monotonic() - started
    assert whole.status == 0, whole.stderr
    expected = command.result(folder / "whole", whole)
    for number in range(times):
        out = folder / f"twice{number}"
        out.mkdir()
        done = interrupt(command, out, draw.uniform(0.05, 0.9), seconds, again_after=draw.uniform(0, 0.5))
        assert "Traceback" not in done.stderr, done.stderr
        assert "ignored" not in done.stderr, done.stderr
        assert done.status in (0, 130, -signal.SIGINT), (done.status, done.stderr)
        if done.status == 130:
            assert sum("error: " in line for line in done.stderr.splitlines()) == 1, done.stderr
        ended += done.status != 0
        if command.is_resumed and done.status:
            again = run_command(*_with_output(command.args, out), *command.go_on)
            was_complete = "exists; give --overwrite" in again.complaint
            assert again.status == 0 or was_complete, again.stderr
            assert command.result(out, again) == expected
        shutil.rmtree(out)
    return ended


def test_ctrl_c_twice(commands: dict[str, Interrupted], tmp_path: Path) -> None:
    """One command once; at night all of them ten times."""
    press_twice(commands["preprocess"], tmp_path, times=1, seed=3)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["pretrain", "preprocess", "convert", "generate", "eval"])
def test_ctrl_c_twice_ten_times(
    commands: dict[str, Interrupted], tmp_path: Path, report: ReportTables, name: str
) -> None:
    """In one process and, where a command starts ranks, in two."""
    header = ("command", "tried", "ended by it", "tracebacks")
    ranks = ["--nproc-per-node", 2, "--tensor-model-parallel-size", 2]
    for more in [[], ranks] if name in ("pretrain", "generate", "eval") else [[]]:
        command = replace(commands[name], args=[*commands[name].args, *more])
        ended = press_twice(command, tmp_path / f"ranks{len(more)}", 10, random.randrange(1 << 30))
        label = f"{name}, two processes" if more else name
        report.add("Interrupted by two Ctrl-C at random moments", header, label, 10, ended, 0)


def fill_disk(command: Interrupted, name: str, folder: Path, limit: int) -> Finished:
    """Run a command that may write files of `limit` bytes at most: what is beyond has no space."""
    folder.mkdir()
    running = RunningCommand(*_with_output(command.args, folder))
    resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (limit, limit))
    done = running.finish(timeout=120)
    assert "Traceback" not in done.stderr, (name, limit, done.stderr)
    assert "ignored" not in done.stderr, (name, limit, done.stderr)
    if done.status:
        assert done.status == 1
        assert re.search("no space (is )?left", done.complaint), (
            name,
            limit,
            done.stderr,
        )
    return done


def test_a_full_disk_is_one_line(commands: dict[str, Interrupted], tmp_path: Path) -> None:
    """Of training, which writes most; at night of all commands, at drawn sizes."""
    done = fill_disk(commands["pretrain"], "pretrain", tmp_path / "out", 60_000)
    assert done.status == 1, done.stderr
    assert "the same command with --auto-resume goes on" in done.complaint


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["pretrain", "preprocess", "convert", "generate", "eval"])
def test_a_full_disk_at_any_size_is_one_line(
    commands: dict[str, Interrupted], tmp_path: Path, report: ReportTables, name: str
) -> None:
    """Drawn sizes; with space again the same command goes on, and gives what it gives without."""
    command, full = commands[name], 0
    (tmp_path / "whole").mkdir()
    whole = run_command(*_with_output(command.args, tmp_path / "whole"))
    assert whole.status == 0, whole.stderr
    written = [path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    largest = max([len(whole.stdout), len(whole.stderr), *written])
    for number in range(10):
        out = tmp_path / f"out{number}"
        done = fill_disk(command, name, out, random.randrange(largest))
        full += done.status == 1
        if command.is_resumed and done.status:
            again = run_command(*_with_output(command.args, out), *command.go_on)
            assert again.status == 0, again.stderr
            assert command.result(out, again) == command.result(tmp_path / "whole", whole)
    report.add("Full disks of drawn sizes", ("command", "tried", "full", "tracebacks"), name, 10, full, 0)


def test_ctrl_c_of_several_processes_saves_and_a_second_ends_at_once(
    commands: dict[str, Interrupted], tmp_path: Path
) -> None:
    args = _with_output(commands["pretrain"].args, tmp_path)
    flags = [*args, "--nproc-per-node", 2, "--tensor-model-parallel-size", 2, "--train-iters", 4000]

    def begun(name: str) -> RunningCommand:
        running = RunningCommand(*flags, "--save", tmp_path / name)
        metrics = tmp_path / name / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) >= 2, running)
        running.send_group_signal(signal.SIGINT)
        return running

    done = begun("run").finish(timeout=60)
    assert done.status == 130, done.stderr
    assert "Traceback" not in done.stderr
    reached = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert saved_iterations(tmp_path / "run") == [reached]
    assert f"{tmp_path}/run holds iteration {reached}; the same command with --auto-resume" in done.complaint
    assert "Ctrl-C: saving after this step; a second one ends the run at once" in done.stderr

    impatient = begun("ended")
    wait_for(lambda: "Ctrl-C: saving" in impatient.stderr, impatient)
    impatient.send_group_signal(signal.SIGINT)
    done = impatient.finish(timeout=30)
    assert done.status == 130, (done.status, done.stderr)
    assert "Traceback" not in done.stderr, done.stderr
    assert "--auto-resume" in done.complaint or "run the same command again" in done.complaint


def test_auto_resume_says_that_it_found_nothing_and_what_changed(
    commands: dict[str, Interrupted], tmp_path: Path
) -> None:
    args = _with_output(commands["pretrain"].args, tmp_path / "run")
    first = call(*args, "--auto-resume", "--train-iters", 2, "--lr", 1e-3)
    assert f"auto_resume: {tmp_path}/run holds no checkpoint; this is a new run" in first.stderr
    changed = ("--lr", 2e-3, "--lr-decay-style", "cosine", "--clip-grad", 0.5, "--micro-batch-size", 2)
    again = call(*args, "--auto-resume", "--train-iters", 3, *changed)
    assert again.status == 0, again.stderr
    lines = sorted(line for line in again.stderr.splitlines() if line.startswith("resuming with another"))
    assert lines == sorted(
        f"resuming with another {name}: {before} until here, {after} from here on"
        for name, before, after in (
            ("train_iters", 2, 3),
            ("lr", 0.001, 0.002),
            ("lr_decay_style", "linear", "cosine"),
            ("clip_grad", 1.0, 0.5),
            ("micro_batch_size", 1, 2),
        )
    )
    same = call(*args, "--auto-resume", "--train-iters", 3, *changed)
    assert "resuming with another" not in same.stderr
