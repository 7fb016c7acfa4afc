"""What a report says of a run is made from what ran: examples, prompt, sampling, choice of samples, groups."""

import json
import random
from pathlib import Path

import pytest
import yaml

from ascendspeed_eval.aggregate import task_results
from ascendspeed_eval.evaluation import prepare_evaluation
from ascendspeed_eval.protocol import describe_protocol
from ascendspeed_eval.report import markdown
from ascendspeed_eval.tasks.mmlu_subjects import CATEGORIES, CATEGORIES_OF_LM_EVAL
from ascendspeed_eval.tasks.registry import all_tasks, find_task
from ascendspeed_eval.tasks.samples import GenerationSettings
from support.commands import call
from support.shared_data import BENCHMARK_FOLDERS, needs_shared_data
from support.tables import ReportTables

VARIANTS = [(task.name, variant) for task in all_tasks().values() for variant in task.variants]

DRAWN = 4
"""Settings for each protocol."""


@needs_shared_data
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_the_protocol_sentence_follows_the_settings(name: str, variant: str, report: ReportTables) -> None:
    """Drawn settings: what stands in the sentence is what the prompts and requests are, and nothing else."""
    task = find_task(name)
    own = task.variants[variant]
    draw = random.Random(f"{name} {variant}")
    folder = str(BENCHMARK_FOLDERS[name])
    for _ in range(DRAWN):
        can_have_examples = own.num_fewshot > 0 and name != "human_eval"
        shots = draw.choice([None, 0, 1, 2, 3]) if can_have_examples else None
        limit = draw.choice([1, 2, 3])
        seed = draw.choice([None, 5])
        temperature = draw.choice([0.0, 0.7])
        generation = GenerationSettings(None, 1 if not temperature else draw.choice([1, 3]), temperature)
        evaluation = prepare_evaluation(
            task, own, folder, limit=limit, limit_seed=seed, num_fewshot=shots, generation=generation
        )
        sentence = describe_protocol(task, own, evaluation.samples, evaluation.settings)
        most = max(sample.num_examples for sample in evaluation.samples)
        assert f"{most or 'zero'}-shot" in sentence
        assert sentence.count("-shot") == 1
        assert ("protocol's own number of examples" in sentence) == (shots not in (None, own.num_fewshot))
        assert ("greedy" in sentence) == (bool(own.max_new_tokens) and not temperature)
        assert ("temperature 0.7" in sentence) == (bool(own.max_new_tokens) and bool(temperature))
        assert ("the first" in sentence.rpartition("of each subset")[2]) == (seed is None)
        assert f"{limit}" in sentence.rpartition("of each subset only")[2]
    header = ("protocol", "settings drawn", "wrong sentences")
    report.add("Sentences of reports against settings", header, f"{name} {variant}", DRAWN, 0)


def test_no_protocol_states_a_setting() -> None:
    for task in all_tasks().values():
        for variant in task.variants.values():
            assert not any(word in variant.summary for word in ("-shot", "greedy", "temperature")), (
                variant.name
            )


def test_categories_of_mmlu_are_those_of_their_source() -> None:
    import lm_eval.tasks

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    found: dict[str, set[str]] = {}
    for path in folder.glob("mmlu_*.yaml"):
        content = yaml.safe_load(path.read_text().replace("!function", ""))
        group = content["tag"].removeprefix("mmlu_").removesuffix("_tasks")
        found.setdefault(group, set()).add(path.stem.removeprefix("mmlu_"))
    theirs = {name.replace(" ", "_"): set(subjects) for name, subjects in CATEGORIES_OF_LM_EVAL.items()}
    assert theirs == found
    moved = {
        (subject, name)
        for name, subjects in CATEGORIES.items()
        for subject in subjects
        if subject not in CATEGORIES_OF_LM_EVAL[name]
    }
    assert moved == {("anatomy", "other")}


@pytest.mark.parametrize(
    ("variant", "group", "source"),
    [("ascendspeed", "other", "hendrycks/test"), ("lm-eval", "stem", "lm-evaluation-harness")],
)
def test_a_report_says_whose_groups_it_shows(tmp_path: Path, variant: str, group: str, source: str) -> None:
    (tmp_path / "test").mkdir()
    for subject in ("anatomy", "sociology"):
        (tmp_path / "test" / f"{subject}_test.csv").write_text("Which?,a,b,c,d,A\nAnd?,a,b,c,d,A\n")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        json.dumps({"contains": "", "text": "A.", "logprobs": {f" {c}": -1.0 for c in "ABCD"}}) + "\n"
    )
    done = call(
        "asd-eval", "run", "--task", "mmlu", "--protocol", variant, "--num-fewshot", 0, "--task-data-path", tmp_path,
        "--scripted-answers", answers, "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["mmlu"]
    assert set(results["groups"]) == {group, "social_sciences"}
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert f"are those of {source}" in text
        assert "zero-shot (the protocol" in text
        assert "5-shot" not in text.replace("2023 README, 5-shot", "")
    assert results["baselines"]["majority"] == 1.0, "always A"
    assert "majority 1.000" in done.stdout
    chosen = call(
        "asd-eval", "run", "--task", "mmlu", "--protocol", variant, "--num-fewshot", 0, "--task-data-path", tmp_path,
        "--scripted-answers", answers, "--subset", group,
    )  # fmt: skip
    assert "| 2 |" in chosen.stdout, chosen.stderr


def test_several_tasks_run_in_one_command(tmp_path: Path) -> None:
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    (tmp_path / "mmlu" / "test" / "anatomy_test.csv").write_text("Which?,a,b,c,d,A\n")
    answers = tmp_path / "answers.jsonl"
    scores = {f" {c}": -1.0 for c in ("A", "B", "C", "D", "Yes", "No")}
    answers.write_text(json.dumps({"contains": "", "text": "A.", "logprobs": scores}) + "\n")
    asked = ("asd-eval", "run", "--task", "boolq,mmlu", "--scripted-answers", answers, "--num-fewshot", 0)
    out = tmp_path / "out"
    done = call(*asked, "--task-data-path", "sample", tmp_path / "mmlu", "--output-dir", out)
    assert done.status == 0, done.stderr
    tasks = [
        list(json.loads((out / name / "results.json").read_text())["tasks"]) for name in ("boolq", "mmlu")
    ]
    assert tasks == [["boolq"], ["mmlu"]]
    done = call(*asked, "--task-data-path", tmp_path / "mmlu")
    assert done.status == 2
    assert "1 path for 2 tasks; give one for each" in done.complaint


def test_samples_are_drawn_with_a_seed() -> None:
    task = find_task("boolq")
    variant = task.variants["lm-eval"]

    def ids(seed: int | None, limit: int = 8) -> list[str]:
        samples = prepare_evaluation(task, variant, "sample", limit=limit, limit_seed=seed).samples
        return [sample.record.id for sample in samples]

    everything = [record.id for record in task.read("sample").records]
    assert ids(None) == everything[:8]
    assert ids(3) == ids(3)
    assert ids(3) != ids(4)
    assert sorted(ids(3), key=everything.index) == ids(3), "in the order of the file"
    assert set(ids(3)) < set(ids(3, limit=16)), "a larger limit adds to a smaller one"


def test_a_text_without_groups_names_none() -> None:
    task = find_task("boolq")
    evaluation = prepare_evaluation(task, task.variants["lm-eval"], "sample", limit=1)
    results = {
        "tasks": {"boolq": task_results(evaluation, [])},
        "model": {"name": "m", "num_parameters": None, "details": {}},
        "run": {},
    }
    assert "Groups" not in markdown(results)
