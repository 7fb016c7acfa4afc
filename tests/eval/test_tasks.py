"""Scripted models with known answers score exactly what they must, on every task, protocol and subset."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_eval.errors import EvaluationError, ScoringError
from ascendspeed_eval.evaluation import Evaluation, prepare_evaluation
from ascendspeed_eval.model import (
    GenerateRequest,
    GenerateResult,
    LoglikelihoodRequest,
    LoglikelihoodResult,
    ModelDescription,
)
from ascendspeed_eval.runner import evaluate
from ascendspeed_eval.scripted import ScriptedModel
from ascendspeed_eval.tasks import custom
from ascendspeed_eval.tasks.registry import all_tasks, find_task
from ascendspeed_eval.tasks.samples import GenerationSettings, Record
from support.commands import call
from support.shared_data import BENCHMARK_FOLDERS, needs_shared_data

VARIANTS = [(task.name, variant) for task in all_tasks().values() for variant in task.variants]


@dataclass
class Oracle:
    """Knows the target of every prompt, and answers some of them wrongly."""

    evaluation: Evaluation
    wrong: frozenset[str]
    targets: dict[str, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.targets = {sample.prompt: sample.record for sample in self.evaluation.samples}

    def describe(self) -> ModelDescription:
        return ModelDescription("oracle", None, None, {"backend": "test"})

    def loglikelihood(self, requests: Sequence[LoglikelihoodRequest]) -> list[LoglikelihoodResult]:
        return [LoglikelihoodResult(self._logprob(request), False, 0) for request in requests]

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        return [GenerateResult(self._text(self.targets[request.prompt]), "stop") for request in requests]

    def _logprob(self, request: LoglikelihoodRequest) -> float:
        record, variant = self.targets[request.context], self.evaluation.variant
        assert variant.choices is not None
        shown = list(variant.choices(record))
        right = shown.index(request.continuation) in variant.targets(record)
        # So far apart that neither the length of a choice nor dividing by it matters.
        return -len(request.continuation) * (1.0 if right != (record.id in self.wrong) else 1000.0)

    def _text(self, record: Record) -> str:
        name, wrong = self.evaluation.variant.name, record.id in self.wrong
        task = self.evaluation.task.name
        if wrong:
            return "    return None  # wrong" if task == "human_eval" else "¿?"
        if task == "human_eval":
            return str(record.fields["canonical_solution"])
        if task in ("mmlu", "ceval"):
            return "ABCD"[record.target[0]]
        if task == "gsm8k":
            return (
                f"So it is. The answer is {record.target}."
                if name == "ascendspeed"
                else f"...\n#### {record.target}"
            )
        if task == "bbh":
            return {"lm-eval": f"So the answer is {record.target}."}.get(name, record.target)
        if isinstance(record.target, list):
            return ",".join(record.target)
        return str(record.target) if name == "ascendspeed" else f"${record.target}$"


def target_list(record: Record) -> bool:
    return not (isinstance(record.target, list) and not record.target)


@needs_shared_data
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_known_answers_get_the_expected_scores(name: str, variant: str, tmp_path: Path) -> None:
    task = find_task(name)
    evaluation = prepare_evaluation(
        task,
        task.variants[variant],
        str(BENCHMARK_FOLDERS[name]),
        limit=8,
        generation=GenerationSettings(allow_code_execution=True),
    )
    records = [sample.record for sample in evaluation.samples]
    wrong = frozenset(record.id for number, record in enumerate(records) if number % 4 == 3)
    results = evaluate(evaluation, Oracle(evaluation, wrong), tmp_path / "out")["tasks"][name]
    unanswerable = _never_right(name, variant, records)
    right = {r.id for r in records} - wrong - unanswerable
    by_subset: dict[str, list[bool]] = {}
    for record in records:
        by_subset.setdefault(record.subset, []).append(record.id in right)
    lines = [
        json.loads(line)
        for line in (tmp_path / "out" / "samples.jsonl").read_text("utf-8").split("\n")
        if line
    ]
    assert {line["id"] for line in lines if next(iter(line["scores"].values())) == 1} == right
    assert results["score"] == pytest.approx(len(right) / len(records), abs=1e-12)
    means = {subset: sum(part) / len(part) for subset, part in by_subset.items()}
    assert results["macro"] == pytest.approx(sum(means.values()) / len(means), abs=1e-12)
    assert {s: part["score"] for s, part in results["subsets"].items()} == pytest.approx(means)
    for group, part in results["groups"].items():
        inside = [value for s in task.groups[group] for value in by_subset.get(s, [])]
        assert part["score"] == pytest.approx(sum(inside) / len(inside))


def _never_right(name: str, variant: str, records: Sequence[Record]) -> set[str]:
    """What no model can get right by a protocol's own rule.

    2023: a decimal answer loses its fraction (none here). Authors and lm-evaluation-harness: answers whose LaTeX their
    reading does not find again within dollars, such as one that itself has dollars or an equals sign.
    """
    if name == "agieval" and variant in ("authors", "lm-eval"):
        from ascendspeed_eval.tasks.math_answers import find_answer, same_answer

        lost = set()
        for record in records:
            if isinstance(record.target, str):
                found = find_answer(f"${record.target}$")
                if variant == "lm-eval":
                    theirs = find_answer(record.target)
                    fine = (
                        (found is theirs) if found is None or theirs is None else same_answer(found, theirs)
                    )
                else:
                    fine = found is not None and same_answer(found, record.target)
                if not fine:
                    lost.add(record.id)
            elif variant == "authors" and "。" in record.target:
                lost.add(record.id)
        return lost
    if name == "agieval" and variant == "ascendspeed":
        return {r.id for r in records if isinstance(r.target, str) and "\n" in r.target}
    return set()


@needs_shared_data
def test_the_unlabelled_split_of_ceval_writes_a_submission(tmp_path: Path) -> None:
    task = find_task("ceval")
    folder = BENCHMARK_FOLDERS["ceval"] / "test"
    evaluation = prepare_evaluation(
        task, task.variants["authors"], str(folder), subsets=["accountant", "logic"]
    )

    class ChoosesB(Oracle):
        def _logprob(self, request: LoglikelihoodRequest) -> float:
            return -1.0 if request.continuation == "B" else -2.0

    results = evaluate(evaluation, ChoosesB(evaluation, frozenset()), tmp_path / "out")
    assert results["tasks"]["ceval"]["num_scored"] == 0
    submission = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert sorted(submission) == ["accountant", "logic"]
    assert submission["logic"] == {str(number): "B" for number in range(20)}
    assert "have no labels" in (tmp_path / "out" / "report.md").read_text()


@needs_shared_data
def test_subsets_groups_and_fewshot_examples_are_chosen() -> None:
    task = find_task("mmlu")
    path = str(BENCHMARK_FOLDERS["mmlu"])
    stem = prepare_evaluation(task, task.variants["lm-eval"], path, subsets=["stem"], limit=1)
    assert len(stem.samples) == 19
    zero = prepare_evaluation(
        task, task.variants["lm-eval"], path, subsets=["anatomy"], limit=1, num_fewshot=0
    )
    assert zero.samples[0].prompt.count("Answer:") == 1
    shown = call("asd-eval", "tasks", "--task", "mmlu", "--task-data-path", path).stdout
    assert "The following are multiple choice questions (with answers) about abstract algebra." in shown


CAPITALS = """
name: capitals
data: capitals.csv
question: "Q: {{ country }}\\nA:"
choices: [" Paris", " Rome", " {{ country }}"]
target: "{{ capital }}"
num_fewshot: 1
examples: examples.csv
"""


def test_a_yaml_task_runs(tmp_path: Path) -> None:
    (tmp_path / "capitals.yaml").write_text(CAPITALS)
    (tmp_path / "capitals.csv").write_text("country,capital\nFrance,Paris\nItaly,Rome\n")
    (tmp_path / "examples.csv").write_text("country,capital\nSingapore,Singapore\n")
    (tmp_path / "answers.jsonl").write_text(
        json.dumps({"contains": "", "logprobs": {" Paris": -1, " Rome": -2}})
    )
    done = call(
        "asd-eval", "run", "--task", tmp_path / "capitals.yaml", "--task-data-path", "sample", "--scripted-answers",
        tmp_path / "answers.jsonl", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    first = json.loads((tmp_path / "out" / "samples.jsonl").read_text().split("\n")[0])
    assert first["prompt"] == "Q: Singapore\nA: Singapore\n\nQ: France\nA:"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["capitals"]["score"] == 0.5


def test_a_regular_expression_that_never_ends_fails_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom, "MAX_SECONDS", 0.2)
    path = tmp_path / "one.yaml"
    path.write_text("name: one\nquestion: '{{ q }}'\ntarget: x\nextract: '(a|aa)+$'\n")
    task = custom.read_task(path)
    extract = task.variants["own"].extract
    record = Record("1", "one", {}, "x")
    assert extract("baa", record)["strict"] == "a"
    with pytest.raises(
        ScoringError, match=r"extract='\(a\|aa\)\+\$' takes more than 0.2 s for a text of 61 char"
    ):
        extract("a" * 60 + "!", record)
    (tmp_path / "q.jsonl").write_text('{"q": "1"}\n{"q": "2"}\n')
    answers = [{"contains": "1", "text": "a" * 60 + "!"}, {"contains": "2", "text": "baa"}]
    evaluation = prepare_evaluation(task, task.variants["own"], str(tmp_path / "q.jsonl"))
    results = evaluate(evaluation, ScriptedModel(answers, "scripted"), tmp_path / "out")
    assert results["tasks"]["one"]["num_failed"] == 1
    assert results["tasks"]["one"]["num_samples"] == 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("target:", "taget:"), "did you mean target"),
        (("{{ capital }}", "{{ nothing }}"), "'nothing' is undefined"),
        (("{{ capital }}", "{{ ''.__class__.__mro__ }}"), "unsafe"),
        (("{{ capital }}", "{{ capital"), "is not a valid template"),
        (("name: capitals", "name: !!python/object/apply:os.getcwd []"), "is not YAML"),
    ],
)
def test_a_bad_yaml_task_is_reported(change: tuple[str, str], complaint: str, tmp_path: Path) -> None:
    (tmp_path / "capitals.yaml").write_text(CAPITALS.replace(*change))
    (tmp_path / "capitals.csv").write_text("country,capital\nFrance,Paris\n")
    (tmp_path / "examples.csv").write_text("country,capital\nSingapore,Singapore\n")
    (tmp_path / "answers.jsonl").write_text("{}")
    done = call(
        "asd-eval", "run", "--task", tmp_path / "capitals.yaml", "--task-data-path", "sample", "--scripted-answers",
        tmp_path / "answers.jsonl",
    )  # fmt: skip
    assert done.status == 1
    assert complaint in done.complaint


SLIPS = {
    "stop: ['']": "stop",
    "stop: [1]": "stop",
    "stop: [No]": "quotes",
    "choices: [Yes, No]": "quotes",
    "choices: []": "choices",
    "choices: ['a', 'a']": "twice",
    "choices: '{{ x'": "choices",
    "target: No": "twice",
    "extract: '('": "extract",
    "extract: 'a*'": "extract",
    "max_new_tokens: 0": "max_new_tokens",
    "max_new_tokens: 1.5": "max_new_tokens",
    "num_fewshot: true": "num_fewshot",
    "data: 2024-01-01": "data",
    "subset: ''": "subset",
    "header: ~": "header",
    "? [1, 2]\n: 3": "YAML",
    "stop: &a [*a]": "stop",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_in_a_yaml_task_are_found_when_it_is_read(slip: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f'name: own\nquestion: "q"\ntarget: "t"\n{slip}\n')
    with pytest.raises(EvaluationError, match=r"own\.yaml") as refused:
        find_task(str(tmp_path / "own.yaml"))
    assert SLIPS[slip] in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_report_escapes_text_of_models(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"question": "a <b>?", "answer": "#### 3"}))
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"contains": "", "text": "<script>alert(1)</script> #### 3"})
    )
    done = call(
        "asd-eval", "run", "--task", "gsm8k", "--task-data-path", tmp_path / "d.jsonl", "--num-fewshot", 0,
        "--protocol", "lm-eval", "--scripted-answers", tmp_path / "a.jsonl", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["gsm8k"]["metrics"] == {
        "strict": 1.0,
        "flexible": 1.0,
    }


def test_compare_finds_the_changed_samples(tmp_path: Path) -> None:
    records = [{"question": f"q{n}", "passage": "p", "answer": True} for n in range(12)]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, records)))
    for name, wrong in (("a", range(6)), ("b", ())):
        answers: list[dict[str, Any]] = [
            {"contains": f"q{n}?", "logprobs": {" Yes": -3 if n in wrong else -1, " No": -2}}
            for n in range(12)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, answers)))
        done = call(
            "asd-eval", "run", "--task", "boolq", "--task-data-path", tmp_path / "dev.jsonl", "--scripted-answers",
            tmp_path / f"{name}.jsonl", "--output-dir", tmp_path / name,
        )  # fmt: skip
        assert done.status == 0, done.stderr
    shown = call("asd-eval", "compare", tmp_path / "a", tmp_path / "b").stdout
    # Six changes, all in one direction: 2 / 2**6.
    assert "6 samples gained, 0 lost; exact McNemar test p = 0.0312" in shown
    assert "Difference +0.5000" in shown
    assert "| dev-1 | 0 | 1 | No | Yes |" in shown


@needs_shared_data
@pytest.mark.parametrize("name", ["boolq", "mmlu", "gsm8k", "human_eval", "ceval"])
def test_a_hugging_face_dataset_gives_the_same_prompts(name: str, tmp_path: Path) -> None:
    """Made from the original files in the hub's columns and file names."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from ascendspeed_eval.hub_datasets import DATASETS, find_data

    task = find_task(name)
    # google/boolq has no titles, which the protocol lm-eval shows.
    variant = task.variants["ascendspeed" if name == "boolq" else "lm-eval"]
    wanted = prepare_evaluation(task, variant, str(BENCHMARK_FOLDERS[name]), limit=3)
    splits: dict[tuple[str, str], list[dict[str, Any]]] = {}
    asked, shown = DATASETS[name].splits[0], (*DATASETS[name].splits, "")[1]
    for split, records in (
        (asked, wanted.benchmark.records),
        (shown, [r for part in wanted.benchmark.examples.values() for r in part]),
    ):
        for record in records:
            row = dict(record.fields)
            if name == "mmlu":
                row = {
                    "question": row["question"],
                    "subject": record.subset,
                    "choices": [row[c] for c in "ABCD"],
                    "answer": record.target[0],
                }
            config = record.subset if name == "ceval" else DATASETS[name].configs[0]
            splits.setdefault((config, split), []).append(row)
    for (config, split), rows in splits.items():
        (tmp_path / "hub" / config).mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(
            tmp_path / "hub" / config / f"{split}-00000-of-00001.parquet"
        )
    (tmp_path / "files").mkdir()
    folder, _ = find_data(name, f"hf:{tmp_path / 'hub'}", tmp_path / "files")
    found = prepare_evaluation(task, variant, folder)
    assert {s.prompt for s in found.samples} == {s.prompt for s in wanted.samples}
