"""Recipes of evaluation: one for each task of 2023, run by name."""

import json
from pathlib import Path

import pytest

from ascendspeed_eval.errors import UsageError
from ascendspeed_eval.recipes import find_recipe, read_recipe, recipe_names, recipe_options
from ascendspeed_eval.tasks.registry import find_task, find_variant
from support.commands import call

TASKS = ["agieval", "bbh", "boolq", "ceval", "gsm8k", "human_eval", "mmlu"]


def test_every_task_of_2023_has_its_recipe() -> None:
    assert recipe_names() == TASKS
    listed = call("asd-eval", "recipes").stdout.splitlines()
    assert [line.partition(":")[0] for line in listed] == TASKS


@pytest.mark.parametrize("name", TASKS)
def test_a_recipe_asks_for_what_its_task_has(name: str) -> None:
    recipe = read_recipe(find_recipe(name))
    (task,) = recipe["task"]
    variant = find_variant(find_task(task), recipe["protocol"])
    # A length is given only where text is generated.
    assert ("max_new_tokens" in recipe) <= bool(variant.max_new_tokens)
    assert call("asd-eval", "recipes", name).stdout == find_recipe(name).read_text()


def test_a_recipe_runs_by_name(tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"contains": "", "logprobs": {" Yes": -1.0, " No": -2.0}}) + "\n")
    more: list[object] = ["--task-data-path", "sample", "--scripted-answers", answers, "--output-dir"]
    scores = []
    for asked in (["boolq"], ["--task", "boolq", "--protocol", "ascendspeed"]):
        done = call("asd-eval", "run", *asked, *more, tmp_path / str(len(asked)))
        assert done.status == 0, done.stderr
        results = json.loads((tmp_path / str(len(asked)) / "results.json").read_text())
        scores.append(results["tasks"]["boolq"]["score"])
        assert results["run"].get("recipe") == ("boolq" if asked == ["boolq"] else None)
        assert ("recipe: boolq" in done.stderr) == (asked == ["boolq"])
    assert scores[0] == scores[1]


def test_options_that_were_given_win(tmp_path: Path) -> None:
    """Options of every kind: lists, numbers with a default, flags, those of a backend."""
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"contains": "", "logprobs": {" Yes": -1.0, " No": -2.0}}) + "\n")
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f"task = ['boolq']\ntask_data_path = ['sample']\nlimit = 3\nseed = 7\nallow_code_execution = true\n"
        f"scripted_answers = '{answers}'\n"
    )
    for given, limit, seed in (((), 3, 7), (("--limit", 2, "--seed", 1234), 2, 1234)):
        done = call("asd-eval", "run", recipe, *given, "--output-dir", tmp_path / str(seed))
        assert done.status == 0, done.stderr
        run = json.loads((tmp_path / str(seed) / "results.json").read_text())["run"]
        assert (run["settings"]["limit"], run["settings"]["seed"]) == (limit, seed)
        assert run["recipe"] == str(recipe)
    recipe.write_text("task = ['boolq']\nlimit = 'many'\n")
    assert "--limit" in call("asd-eval", "run", recipe).complaint


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("limit = true", "limit is not one value"),
        ("limit = [1, 2]", "limit is not one value"),
        ("limit = {a = 1}", "limit is not one value"),
        ("limit = nan", "--limit"),
        ("temperature = inf", "--temperature"),
        ("task = [['boolq']]", "task is not a list of values"),
        ("allow_code_execution = 'perhaps'", "allow_code_execution is not true or false"),
        ("[run]", "unknown key run"),
        ("limit = ", "is not TOML"),
    ],
)
def test_values_that_are_none(tmp_path: Path, line: str, words: str) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        ("" if line.startswith("task") else "task = 'boolq'\n") + f"task_data_path = 'sample'\n{line}\n"
    )
    done = call("asd-eval", "run", recipe, "--load", tmp_path)
    assert done.status == 2 or "is not TOML" in words, done.stderr
    assert words in done.complaint
    assert done.stdout == ""


def test_what_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gsm8 is no recipe; did you mean gsm8k\?"):
        recipe_options("gsm8", {})
    (tmp_path / "mine.toml").write_text("tasks = ['mmlu']\n")
    with pytest.raises(UsageError, match=r"unknown key tasks; did you mean task\?"):
        recipe_options(str(tmp_path / "mine.toml"), {"task": "list"})
    done = call("asd-eval", "run", "--task-data-path", "sample", "--load", tmp_path)
    assert "task is missing; give --task, or a recipe" in done.complaint
