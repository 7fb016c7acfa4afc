"""A run that was killed goes on with another batch size and number of devices, to the same results."""

import json
import time
from pathlib import Path

import pytest

from ascendspeed_infer.eval_backend import split_by_work
from support.commands import RunningCommand, run_command
from support.models import save_hugging_face, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_hugging_face(
        tiny_config(vocab_size=400, max_position_embeddings=256), path, tokenizer=tokenizer_folder
    )
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MMLU with two subjects, in its own files."""
    root = tmp_path_factory.mktemp("mmlu")
    for split, count in (("dev", 5), ("test", 160)):
        (root / split).mkdir()
        for subject in ("anatomy", "virology"):
            rows = [
                f"what of {n} {subject},it was {n},the {n},of,{'to ' * (n % 7)}and,{'ABCD'[n % 4]}"
                for n in range(count)
            ]
            (root / split / f"{subject}_{split}.csv").write_text("\n".join(rows) + "\n")
    return root


def command(data: Path, folder: Path, output: Path, *flags: object) -> list[object]:
    return [
        "asd-eval", "run", "--task", "mmlu", "--protocol", "lm-eval", "--num-fewshot", 2, "--task-data-path", data,
        "--load", folder, "--device", "cpu", "--output-dir", output, *flags,
    ]  # fmt: skip


@pytest.mark.parametrize("devices", [1, 2])
def test_a_killed_run_resumes_to_the_same_results(
    data: Path, folder: Path, tmp_path: Path, devices: int
) -> None:
    whole = run_command(*command(data, folder, tmp_path / "whole", "--micro-batch-size", 3))
    assert whole.status == 0, whole.stderr
    output = tmp_path / "killed"
    process = RunningCommand(*command(data, folder, output, "--micro-batch-size", 1))
    samples = output / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not (samples.is_file() and samples.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill_session()
    kept = samples.read_bytes().count(b"\n")
    assert 0 < kept < 320
    assert not (output / "results.json").exists()
    resumed = run_command(
        *command(data, folder, output, "--micro-batch-size", 16, "--nproc-per-node", devices)
    )
    assert resumed.status == 0, resumed.stderr
    assert f"{kept} of 320 samples are finished" in resumed.stderr
    assert (output / "results.json").read_bytes() == (tmp_path / "whole" / "results.json").read_bytes()
    assert json.loads((output / "results.json").read_text())["tasks"]["mmlu"]["num_samples"] == 320


def test_a_second_run_on_the_same_folder_fails(data: Path, folder: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "run.lock").open("w") as file:
        file.write("4711")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        done = run_command(*command(data, folder, tmp_path / "out"))
    assert done.status == 1
    assert "is being written by another run (process 4711)" in done.stderr


def test_requests_are_distributed_over_ranks() -> None:
    requests = (
        [("a" * 10, n) for n in range(4)]
        + [("b" * 40, n) for n in range(4)]
        + [("c" * 10, n) for n in range(4)]
    )
    for parts in (1, 2, 3, 5):
        shares = split_by_work(requests, parts)
        assert sorted(number for share in shares for number in share) == list(range(12))
        for share in shares:
            # Requests of one context are never torn apart: each share has all four or none.
            assert all(
                sum(requests[n][0] == text for n in share) in (0, 4)
                for text in ("a" * 10, "b" * 40, "c" * 10)
            )
    assert split_by_work([], 2) == [[], []]
