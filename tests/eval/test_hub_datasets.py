"""Data of tasks by their names on hubs: fetched at a commit, and read as the original files are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

import ascendspeed_data.hub
import ascendspeed_eval.hub
from support.commands import Finished, call
from support.hub_server import Hub, serve_hub, using

QUESTIONS = [
    {"question": f"What is {n} + 1?", "answer": f"It is <<{n}+1={n + 1}>>.\n#### {n + 1}"} for n in range(9)
]
YAML = """name: capitals
question: "Q: {{ country }}\\nA:"
target: "{{ capital }}"
max_new_tokens: 4
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as serving:
        yield serving


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


def files_of(layout: str, first: int = 0) -> dict[str, bytes]:
    files = {
        layout.format(split="test"): parquet(QUESTIONS[first : first + 3]),
        layout.format(split="train"): parquet(QUESTIONS[3:]),
    }
    return {**files, "README.md": b"#", "socratic/test-00000-of-00001.parquet": b"no parquet"}


def run(hub: Hub, folder: Path, task: object, data: str, out: str = "out", **more: str) -> Finished:
    answers = folder / "answers.jsonl"
    answers.write_text('{"contains": "", "text": "4"}\n')
    with using(hub, folder / "cache", **more):
        return call(
            "asd-eval", "run", "--task", task, "--task-data-path", data, "--scripted-answers", answers,
            "--output-dir", folder / out,
        )  # fmt: skip


def results(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return read


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "layout", ["main/{split}-00000-of-00001.parquet", "main/{split}/0000.parquet", "data/{split}-0.parquet"]
)
def test_a_name_gives_the_samples_of_the_original_files(hub: Hub, tmp_path: Path, layout: str) -> None:
    for split, rows in (("test", QUESTIONS[:3]), ("train", QUESTIONS[3:])):
        path = tmp_path / "gsm8k" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert run(hub, tmp_path, "gsm8k", str(tmp_path / "gsm8k"), "local").status == 0
    wanted = [one["prompt"] for one in samples(tmp_path / "local")]
    commit = hub.put("openai/gsm8k", files_of(layout), "datasets")
    newer = hub.put("openai/gsm8k", files_of(layout, first=5), "datasets")
    for number, name in enumerate((f"openai/gsm8k@{commit}", f"hf:openai/gsm8k@{commit}")):
        done = run(hub, tmp_path, "gsm8k", name, f"named{number}")
        assert done.status == 0, done.stderr
        assert [one["prompt"] for one in samples(tmp_path / f"named{number}")] == wanted
        assert results(tmp_path / f"named{number}")["run"]["hub"] == f"openai/gsm8k@{commit}"
    assert "socratic" not in str(hub.asked)
    assert run(hub, tmp_path, "gsm8k", "hf:", "default").status == 0
    assert results(tmp_path / "default")["run"]["hub"] == f"openai/gsm8k@{newer}"
    assert [one["prompt"] for one in samples(tmp_path / "default")] != wanted
    hub.asked.clear()
    assert run(hub, tmp_path, "gsm8k", f"openai/gsm8k@{commit}", "offline", HF_HUB_OFFLINE="1").status == 0
    assert hub.asked == []


def test_a_task_of_ones_own_reads_the_records_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    task = tmp_path / "capitals.yaml"
    task.write_text(YAML)
    line = json.dumps({"country": "France", "capital": "Paris"}).encode() + b"\n"
    hub.put("me/capitals", {"test.jsonl": line * 2, "README.md": b"#"}, "datasets")
    assert run(hub, tmp_path, task, "me/capitals").status == 0
    assert len(samples(tmp_path / "out")) == 2
    pytest.importorskip("modelscope_hub", reason="modelscope-hub is not installed")
    done = run(hub, tmp_path, task, "modelscope:me/capitals", "scope")
    assert done.status == 0, done.stderr
    assert results(tmp_path / "scope")["run"]["hub"] == "modelscope:me/capitals@master"


def test_what_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    hub.put("org/other", {"other/test.parquet": parquet(QUESTIONS)}, "datasets")
    hub.put("org/half", {"main/train-0.parquet": parquet(QUESTIONS)}, "datasets")
    hub.put("org/odd", {"main/test-0.parquet": parquet([{"text": "a"}])}, "datasets")
    hub.put("org/broken", {"main/test-0.parquet": b"PAR1"}, "datasets")
    for data, status, said in (
        ("org/other", 2, "org/other: the repository has no file that gsm8k reads (main/test*.parquet"),
        ("org/half", 1, "org/half has no parquet file of config main, split test"),
        ("org/odd", 1, "question is missing"),
        ("org/broken", 1, "cannot be read"),
        ("org/none", 1, "it is neither a folder here nor a dataset on the hub, or it is private"),
        ("org/other@nope", 1, "the repository has no revision nope"),
        ("hf:/none", 2, "hf:/none is no name on a hub"),
    ):
        done = run(hub, tmp_path, "gsm8k", data)
        assert (done.status, said in done.complaint) == (status, True), done.complaint
    done = run(hub, tmp_path, "bbh", "hf:")
    assert (done.status, "bbh has no Hugging Face dataset" in done.complaint) == (2, True)


def test_the_names_of_hubs_are_read_by_one_code() -> None:
    """ascendspeed-eval imports no other package, so it has a copy; only names of errors differ, and so line breaks."""
    ours, copy = (Path(str(one.__file__)).read_text() for one in (ascendspeed_data.hub, ascendspeed_eval.hub))
    for name, other in (
        ("from ascendspeed_data.command_line import log", ""),
        ("from ascendspeed_eval.progress import log", ""),
        ("ascendspeed_data.errors", "errors"),
        ("ascendspeed_eval.errors", "errors"),
        ("AscendSpeedError", "EvaluationError"),
        ("ConfigError", "UsageError"),
        ("ascendspeed-eval has a copy, because it imports no other package;", ""),
        ("A copy of `ascendspeed_data.hub`, because this package imports no other;", ""),
    ):
        ours, copy = ours.replace(name, other), copy.replace(name, other)
    assert "".join(ours.split()) == "".join(copy.split())
