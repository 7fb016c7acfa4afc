"""`asd-eval run` with made-up answers: what is asked, how it is scored, how a run goes on."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_eval.statistics import standard_error, wilson_interval
from ascendspeed_eval.tasks.registry import find_task
from support.commands import Finished, call

RECORDS = [
    {"question": "is water wet", "title": "t", "passage": "Water is wet.", "answer": True},
    {"question": "is fire cold", "title": "t", "passage": "Fire is hot.", "answer": False},
    {"question": "is {passage} a word", "title": "t", "passage": "It {question} is.", "answer": True},
    {"question": "does it tie", "title": "t", "passage": "Both alike.", "answer": True},
    {"question": "is it wrong", "title": "t", "passage": "Yes, wrong.", "answer": True},
]
ANSWERS = [
    {"contains": "is water wet", "logprobs": {" Yes": -1.0, " No": -2.0, " yes": -3.0, " no": -1.0}},
    {"contains": "is fire cold", "logprobs": {" Yes": -4.0, " No": -2.0, " yes": -3.0, " no": -1.0}},
    {"contains": "a word", "logprobs": {" Yes": -1.0, " No": -1.5, " yes": -3.0, " no": -1.0}},
    {"contains": "does it tie", "logprobs": {" Yes": -1.0, " No": -1.0, " yes": -1.0, " no": -1.0}},
    {"contains": "is it wrong", "logprobs": {" Yes": -5.0, " No": -1.5, " yes": -3.0, " no": -1.0}},
]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "dev.jsonl", RECORDS)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "answers.jsonl", ANSWERS)


def run(data: Path | str, answers: Path, output: Path | None, *flags: object) -> Finished:
    place: list[object] = [] if output is None else ["--output-dir", output]
    return call(
        "asd-eval",
        "run",
        "--task",
        "boolq",
        "--task-data-path",
        data,
        "--scripted-answers",
        answers,
        *place,
        *flags,
    )


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_writes_scores_and_files(data: Path, answers: Path, tmp_path: Path) -> None:
    done = run(data, answers, tmp_path / "out")
    assert done.status == 0, done.stderr
    task = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["boolq"]
    # Right: water, fire, a word, the tie (yes when equal). Wrong: the last.
    assert (task["score"], task["metric"], task["num_samples"]) == (0.8, "accuracy", 5)
    assert task["stderr"] == pytest.approx(math.sqrt(0.8 * 0.2 / 4))
    assert task["baselines"] == {"chance": 0.5, "majority": 0.8}
    assert task["answers"] == {"Yes": 3, "No": 2}
    samples = lines_of(tmp_path / "out" / "samples.jsonl")
    assert [sample["scores"]["accuracy"] for sample in samples] == [1, 1, 1, 1, 0]
    assert samples[0]["prompt"] == "Water is wet.\nQuestion: is water wet?\nAnswer:"
    assert samples[0]["logprobs"] == [-1.0, -2.0]
    assert "0.8000" in done.stdout
    assert "0.8000" in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "run.lock").exists()


def test_the_lm_eval_protocol_is_chosen_by_flag(data: Path, answers: Path, tmp_path: Path) -> None:
    done = run(data, answers, tmp_path / "out", "--protocol", "lm-eval")
    assert done.status == 0
    samples = lines_of(tmp_path / "out" / "samples.jsonl")
    assert samples[0]["choices"] == [" no", " yes"]
    assert samples[0]["prompt"] == "t -- Water is wet.\nQuestion: is water wet?\nAnswer:"
    # It takes the first of equals, which is no.
    assert [sample["scores"]["accuracy"] for sample in samples] == [0, 1, 0, 0, 0]


def test_an_interrupted_run_resumes(data: Path, answers: Path, tmp_path: Path) -> None:
    assert run(data, answers, tmp_path / "whole").status == 0
    assert run(data, answers, tmp_path / "out").status == 0
    samples = tmp_path / "out" / "samples.jsonl"
    kept = samples.read_text().splitlines(keepends=True)
    samples.write_text("".join(kept[:2]) + kept[2][: len(kept[2]) // 2])
    (tmp_path / "out" / "results.json").unlink()
    done = run(data, answers, tmp_path / "out")
    assert done.status == 0, done.stderr
    assert "2 of 5 samples are finished" in done.stderr
    assert samples.read_text() == "".join(kept)
    assert (tmp_path / "out" / "results.json").read_text() == (
        tmp_path / "whole" / "results.json"
    ).read_text()


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--protocol", "lm-eval"], "protocol 'ascendspeed' and 'lm-eval'"),
        (["--limit", 3], "(there and here): limit None and 3; choose"),
        (["--num-fewshot", 0, "--seed", 1], "(there and here): seed 1234 and 1; choose"),
        (
            ["--limit", 2, "--limit-seed", 3],
            "(there and here): limit None and 2; limit_seed None and 3; choose",
        ),
        (
            ["--prompt-template", "{own prompt}"],
            "(there and here): another question template (--prompt-template); ch",
        ),
    ],
)
def test_a_run_with_other_settings_refuses_the_folder(
    data: Path, answers: Path, tmp_path: Path, flags: list[object], key: str
) -> None:
    assert run(data, answers, tmp_path / "out").status == 0
    before = (tmp_path / "out" / "results.json").read_text()
    (tmp_path / "own.txt").write_text("{question}")
    flags = [tmp_path / "own.txt" if flag == "{own prompt}" else flag for flag in flags]
    done = run(data, answers, tmp_path / "out", *flags)
    assert done.status == 1
    assert key in done.complaint
    assert (tmp_path / "out" / "results.json").read_text() == before


def test_a_prompt_template_replaces_the_prompt(data: Path, answers: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("{question} {passage} {other}")
    done = run(data, answers, tmp_path / "out", "--prompt-template", tmp_path / "prompt.txt")
    assert done.status == 0, done.stderr
    prompts = [sample["prompt"] for sample in lines_of(tmp_path / "out" / "samples.jsonl")]
    assert prompts[0] == "is water wet Water is wet. {other}"


def test_braces_in_a_record_stay_text(data: Path, answers: Path, tmp_path: Path) -> None:
    assert run(data, answers, tmp_path / "out").status == 0
    prompt = lines_of(tmp_path / "out" / "samples.jsonl")[2]["prompt"]
    assert prompt == "It {question} is.\nQuestion: is {passage} a word?\nAnswer:"


def test_the_included_sample_runs(tmp_path: Path) -> None:
    answers = write_lines(tmp_path / "a.jsonl", [{"contains": "", "logprobs": {" Yes": -1, " No": -2}}])
    done = run("sample", answers, None)
    assert done.status == 0
    assert "| 40 |" in done.stdout
    task = find_task("boolq")
    records = task.read("sample").records
    share = sum(record.target == "yes" for record in records) / len(records)
    assert f"majority {max(share, 1 - share):.3f}" in done.stdout


def test_several_runs_give_one_table(data: Path, answers: Path, tmp_path: Path) -> None:
    for name, variant in (("a", "ascendspeed"), ("b", "lm-eval")):
        assert run(data, answers, tmp_path / name, "--protocol", variant).status == 0
    done = call("asd-eval", "report", tmp_path / "a", tmp_path / "b")
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[2:4]] == ["| a", "| b"]
    assert "is not complete" in call("asd-eval", "report", tmp_path).complaint


def test_tasks_are_listed() -> None:
    shown = call("asd-eval", "tasks").stdout
    assert "boolq (version 2, 3,270" in shown
    assert "* ascendspeed" in shown


BAD_DATA: dict[str, tuple[str, str]] = {
    "not JSON": ('{"question": \n', "line 1: not JSON"),
    "no passage": ('{"question": "q", "answer": true}\n', "passage is missing or not str"),
    "an answer as text": ('{"question": "q", "passage": "p", "answer": "yes"}\n', "answer is missing or not bool"),
    "a list": ("[1]\n", "it is no object with question"),
    "nothing": ("", "has no record"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_reported(answers: Path, tmp_path: Path, case: str) -> None:
    content, complaint = BAD_DATA[case]
    (tmp_path / "bad.jsonl").write_text(content)
    done = run(tmp_path / "bad.jsonl", answers, tmp_path / "out")
    assert done.status == 1
    assert complaint in done.complaint
    assert not (tmp_path / "out").exists()


def test_bad_flags_are_refused(data: Path, answers: Path, tmp_path: Path) -> None:
    def complaint(*flags: object, status: int = 2) -> str:
        done = call("asd-eval", "run", *flags)
        assert done.status == status, done.stderr
        return done.complaint

    task: list[object] = ["--task", "boolq", "--task-data-path", data]
    scripted: list[object] = ["--scripted-answers", answers]
    assert "did you mean boolq" in complaint("--task", "boolqq", *scripted)
    assert "did you mean lm-eval" in complaint(*task, *scripted, "--protocol", "lm-evl")
    assert "no model is given; choose one. Installed backends:" in complaint(*task)
    assert "the options name several models" in complaint(*task, *scripted, "--load", "x")
    assert "--bf16 is not an option of the backend scripted" in complaint(*task, *scripted, "--bf16")
    assert "--task-data-path is missing" in complaint("--task", "boolq", *scripted)
    assert "has no .jsonl file" in complaint(
        "--task", "boolq", "--task-data-path", tmp_path / "none", *scripted, status=1
    )
    assert "has no answer for the prompt" in complaint(
        *task, "--scripted-answers", write_lines(tmp_path / "few.jsonl", ANSWERS[:1]), status=1
    )
    assert "does not exist" in complaint(*task, "--scripted-answers", tmp_path / "none", status=1)
    assert "checkpoint /nowhere does not exist" in complaint(*task, "--load", "/nowhere", status=1)


def test_errors_and_intervals_have_known_values() -> None:
    assert standard_error(0.5, 101) == pytest.approx(0.05)
    assert standard_error(1.0, 1) == 0.0
    # Brown, Cai and DasGupta (2001), Interval Estimation for a Binomial Proportion: Wilson for 0 of 10 and 5 of 10.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
