"""A server that misbehaves at random changes no score, loses no answer and ends no run."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from support.commands import Finished, RunningCommand, call
from support.misbehaving_server import ANY_REQUEST, SCORE_REQUEST, TEXT_REQUEST, MisbehavingServer
from support.tables import ReportTables

SEED, SHARE, CONCURRENCY = 18, 0.2, 32
KILLS = 3
REFUSED = 7
FILES = ("results.json", "samples.jsonl", "report.md", "report.html")
HEADER = (
    "task",
    "samples",
    "bad answers",
    "ways",
    "kills",
    "lost to kills",
    "asked twice else",
    "files unequal",
)


def questions(task: str, count: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Records and what a good server answers; about three of five answers are right."""
    draw, records, texts = random.Random(SEED), [], {}
    for number in range(count):
        is_right, key = draw.random() < 0.6, f"number {number}"
        if task == "gsm8k":
            texts[key] = f" Let us see \U0001f600. The answer is {number if is_right else number + 1}."
            records.append({"question": f"What is number {number}?", "answer": f"#### {number}"})
        else:
            answer = draw.random() < 0.5
            texts[key] = " Yes" if answer == is_right else " No"
            records.append({"question": f"is it number {number}", "passage": "It is 水.", "answer": answer})
    return records, texts


def command(task: str, data: Path, port: int, output: Path) -> list[object]:
    return [
        "asd-eval", "run", "--task", task, "--num-fewshot", 0, "--task-data-path", data, "--retries", 12,
        "--base-url", f"http://127.0.0.1:{port}/v1", "--served-model", "m", "--concurrency", CONCURRENCY,
        "--output-dir", output,
    ]  # fmt: skip


def kept(output: Path) -> set[str]:
    file = output / "samples.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
    return {json.loads(line)["prompt"] for line in lines}


def killed(words: list[object], server: MisbehavingServer, after: int) -> None:
    """Start a run and kill it once the server has given so many good answers."""
    process = RunningCommand(*words)
    deadline = time.monotonic() + 200
    while server.good.total() < after:
        assert time.monotonic() < deadline, process.stderr
        time.sleep(0.002)
    process.kill_session()


@pytest.mark.parametrize(
    ("task", "count"),
    [
        ("gsm8k", 250),
        ("boolq", 60),
        pytest.param("gsm8k", 2000, marks=pytest.mark.nightly),
        pytest.param("boolq", 2000, marks=pytest.mark.nightly),
    ],
)
def test_a_misbehaving_server_changes_nothing(
    task: str, count: int, tmp_path: Path, report: ReportTables
) -> None:
    """A fifth of the answers is bad; the run is killed three times; its files equal those of a good server."""
    records, texts = questions(task, count)
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in records))
    offsets = ("", "<s>", "<|begin_of_text|>", "ids")
    good = MisbehavingServer(texts, SEED, 0.0)
    with good.serve() as port:
        whole = call(*command(task, data, port, tmp_path / "good"))
    assert whole.status == 0, whole.stderr
    server = MisbehavingServer(texts, SEED, SHARE, offsets)
    prompts = list(good.good)
    server.refused = set(random.Random(SEED).sample(prompts, REFUSED))
    words, lost = command(task, data, port, tmp_path / "bad"), set[str]()
    with server.serve(port):
        for number in range(KILLS):
            killed(words, server, (number + 1) * len(prompts) // (KILLS + 1))
            # Scoring asks with each choice after the prompt.
            found = tuple(kept(tmp_path / "bad"))
            lost |= {one for one in server.good if not one.startswith(found)}
        last = call(*words)
        check_refused(last, tmp_path / "bad", server, task)
        server.refused.clear()
        asked = server.tries.copy()
        done = call(*words)
    assert done.status == 0, done.stderr
    assert not (tmp_path / "bad" / "failed.jsonl").exists()
    again = {one for one in server.tries if server.tries[one] > asked[one]}
    if task == "gsm8k":
        assert len(again) == REFUSED, "only what failed is asked for again"
        assert len(lost) <= KILLS * CONCURRENCY
        twice = {one for one, times in server.good.items() if times > 1}
        assert twice <= lost
    folders = (tmp_path / "good", tmp_path / "bad")
    different = [one for one in FILES if len({(folder / one).read_bytes() for folder in folders}) > 1]
    ways = ANY_REQUEST | (TEXT_REQUEST if task == "gsm8k" else SCORE_REQUEST)
    assert len(server.bad) >= (15 if count < 1000 else len(ways))
    assert set(server.bad) <= set(ways)
    share = server.bad.total() / (server.bad.total() + server.good.total())
    assert 0.15 < share < 0.25
    report.add(
        "A server that misbehaves at random", HEADER, task, count, server.bad.total(), len(server.bad), KILLS,
        len(lost),
        len({one for one, times in server.good.items() if times > 1} - lost), len(different),
    )  # fmt: skip
    assert different == []


def check_refused(done: Finished, output: Path, server: MisbehavingServer, task: str) -> None:
    """Samples that fail for good are named, counted and left out of the score."""
    assert done.status == 1
    failed = [json.loads(line) for line in (output / "failed.jsonl").read_text().splitlines()]
    entry = json.loads((output / "results.json").read_text())["tasks"][task]
    # Both choices of a question may be refused; its sample fails once.
    questions = {prompt.rpartition("Answer:")[0] or prompt for prompt in server.refused}
    assert entry["num_failed"] == len(failed) == len(questions)
    assert all("status 400" in one["reason"] and "not allowed" in one["reason"] for one in failed)
    assert f"{len(failed)} samples failed and have no score" in done.complaint
    assert (
        f"{len(failed)} of {entry['num_samples'] + len(failed)} samples failed"
        in (output / "report.md").read_text()
    )
