"""A run that stands still ends, and says which process is to blame."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ascendspeed_core.models.families import find_family
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.observability.watchdog import RankStatus, verdict
from core.test_pretrain_command import wait_for
from support.commands import RunningCommand, run_command
from support.models import tiny_config

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "model.json"
    path.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400))))
    return path


def status_of(rank: int, waits: bool, beats: int = 5) -> RankStatus:
    return RankStatus(rank, 3, f"layers.{rank}", beats, f"file.py:{rank} in f{rank}", waits, ("line",))


def test_the_verdict_names_who_does_not_wait() -> None:
    message, blamed = verdict([status_of(0, True), status_of(1, False), status_of(2, True)], 3, 60)
    assert message == (
        "no progress for 60 s (--hang-timeout-seconds): rank 1 stands in iteration 3, layers.1: file.py:1 in f1; ranks "
        "0, 2 wait for others"
    )
    assert [answer.rank for answer in blamed] == [1]


def test_the_verdict_names_who_does_not_answer() -> None:
    message, blamed = verdict([status_of(0, True)], 2, 1.5)
    assert "for 1.5 s" in message
    assert message.endswith(
        "rank 1 does not answer: it is stopped, or stuck outside Python; rank 0 waits for others"
    )
    assert not blamed


def test_when_all_wait_the_verdict_names_who_is_furthest_behind() -> None:
    message, blamed = verdict([status_of(0, True, 9), status_of(1, True, 8)], 2, 60)
    assert (
        "all ranks wait for each other or for their device; furthest behind: rank 1 in iteration" in message
    )
    assert [answer.rank for answer in blamed] == [1]


@pytest.mark.parametrize("which", ["disk", "order"])
def test_processes_that_hang(which: str, tmp_path: Path) -> None:
    processes = []
    port = 20000 + os.getpid() % 20000 + (which == "disk")
    for rank in range(3):
        place = {
            "RANK": rank, "WORLD_SIZE": 3, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        variables = {name: str(value) for name, value in place.items()}
        processes.append(RunningCommand("-m", "core.hanging_process", which, cwd=TESTS, **variables))
    done = [process.finish(timeout=120) for process in processes]
    ended = [each.stderr for each in done]
    assert [each.status for each in done] == [1, 1, 1], ended
    for stderr in ended:
        complaint = stderr.strip().splitlines()[-1]
        assert "no progress for 1 s (--hang-timeout-seconds): " in complaint
        if which == "disk":
            assert "rank 1 stands in iteration 7, step: " in complaint
            assert f"{TESTS / 'core' / 'hanging_process.py'}:" in complaint
            assert "in read_from_a_dead_disk; ranks 0, 2 wait for others" in complaint
        else:
            assert "all ranks wait for each other" in complaint
            assert "rank 1 in iteration 7, step: " in complaint
    blamed = "read_from_a_dead_disk" if which == "disk" else "in recv"
    assert "stack of rank 1, innermost call last:" in ended[0]
    assert blamed in ended[0].split("stack of rank 1")[1]


def test_a_stopped_process_of_a_run_is_named_and_ended(
    tmp_path: Path, dataset: Path, model_json: Path
) -> None:
    arguments: list[object] = [
        "asd-core", "pretrain", "--model-config", model_json, "--data-path", dataset, "--seq-length", 16,
        "--train-iters", 100000, "--global-batch-size", 2, "--save", tmp_path / "run", "--device", "cpu",
        "--nproc-per-node", 2, "--hang-timeout-seconds", 2,
    ]  # fmt: skip
    running = RunningCommand(*arguments)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) >= 3, running)
    workers = sorted(psutil.Process(running.pid).children(), key=lambda child: child.pid)
    assert len(workers) == 2
    # Started in the order of their ranks.
    workers[1].send_signal(signal.SIGSTOP)
    try:
        done = running.finish(timeout=120)
    finally:
        for child in workers:
            with suppress(psutil.NoSuchProcess):
                child.kill()
    assert done.status == 1
    assert "no progress for 2 s" in done.complaint
    assert "rank 1 does not answer" in done.complaint
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in workers)


def test_a_single_process_that_is_too_slow(tmp_path: Path, dataset: Path, model_json: Path) -> None:
    done = run_command(
        "asd-core", "pretrain", "--model-config", model_json, "--data-path", dataset, "--seq-length", 16,
        "--train-iters", 1000000, "--device", "cpu", "--hang-timeout-seconds", 1e-9,
    )  # fmt: skip
    assert done.status == 1
    assert "no progress for 1e-09 s (--hang-timeout-seconds): " in done.complaint
    assert "rank 0" in done.complaint
