"""The report of a run in Markdown: scores, and everything that produced them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ascendspeed_eval.answer_quality import notes
from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.report_html import html_report
from ascendspeed_eval.small_files import KeyTypes, check_keys, is_a, parse_json, read_text
from ascendspeed_eval.tasks.samples import ScoredSample

TOY_MODEL_PARAMETERS = 100_000_000
REPORT, REPORT_HTML = "report.md", "report.html"


def warnings(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a reader must know to interpret the scores."""
    parameters = results["model"]["num_parameters"]
    if parameters is not None and parameters < TOY_MODEL_PARAMETERS:
        yield (
            f"This is a toy model ({parameters:,} parameters): its scores show that everything runs, not what a model "
            "can do."
        )
    for name, task in results["tasks"].items():
        if task["truncated_samples"]:
            yield f"{name}: {task['truncated_samples']} prompts were too long and lost their beginning."
        yield from notes(name, task)
        unlabelled = task["num_samples"] - task["num_scored"]
        if unlabelled:
            yield f"{name}: {unlabelled} questions have no labels and so no score; submission.json has the answers."
        best = max(task["baselines"].values(), default=None)
        if best is not None and task["num_scored"] and task["confidence_interval_95"][0] <= best:
            yield f"{name}: the score is not significantly above {best:.3f}, a score without a model."


def markdown(results: Mapping[str, Any]) -> str:
    """Return the report of one run."""
    model = results["model"]
    size = f", {model['num_parameters']:,} parameters" if model["num_parameters"] else ""
    lines = [f"# {_plain(model['name'])}{size}", ""]
    lines += [f"> {warning}" for warning in warnings(results)]
    lines += ["", *_table(_score_rows([("", results)])), ""]
    for name, task in results["tasks"].items():
        default = " (the default)" if task["is_default_protocol"] else ""
        lines.append(f"- {name}, protocol `{task['protocol']}`{default}: {task['protocol_summary']}.")
        lines += [f"- metrics: {', '.join(f'{key} {value:.4f}' for key, value in task['metrics'].items())}"]
        lines += [f"- answers: {task['answers']}"] if task["answers"] else []
        reasons = ", ".join(f"{key} {value}" for key, value in task.get("finish_reasons", {}).items())
        lines += [f"- why generated texts ended: {reasons}"] if reasons else []
        if len(task["subsets"]) > 1:
            lines += ["", *_table(_groups_and_subsets(task)), ""]
            lines += [f"Groups in bold are those of {task['groups_source']}."] if task["groups"] else []
        lines += (
            ["", "Published scores:", "", *_table(_references(task)), ""] if task["reference_scores"] else []
        )
    lines += ["", "What produced these numbers:", ""]
    lines += [f"- {key}: `{value}`" for key, value in {**results["run"], **model["details"]}.items()]
    return "\n".join(lines) + "\n"


def write_report(folder: Path, results: Mapping[str, Any], scored: Sequence[ScoredSample]) -> None:
    """Write `report.md` and `report.html`."""
    # Texts of models may hold half a surrogate pair, which UTF-8 cannot hold.
    (folder / REPORT).write_text(markdown(results), encoding="utf-8", errors="backslashreplace")
    page = html_report(results, list(warnings(results)), scored)
    (folder / REPORT_HTML).write_text(page, encoding="utf-8", errors="backslashreplace")


def read_results(folder: Path) -> dict[str, Any]:
    """Return the `results.json` of a run.

    Raises:
        EvaluationError: the file does not exist.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist; the run in {folder} is not complete")
    results: dict[str, Any] = parse_json(read_text(path), str(path))
    check_keys(results, {"model": dict, "run": dict, "tasks": dict}, str(path))
    check_keys(results["model"], {"name": str}, f"{path}: model")
    check_keys(results["run"], {"data_sha256": str, "protocol": str}, f"{path}: run")
    for name, task in results["tasks"].items():
        where = f"{path}: tasks: {name}"
        check_keys(task, _TASK_TYPES, where)
        interval, references = task["confidence_interval_95"], task["reference_scores"]
        check_keys(task["baselines"], dict.fromkeys(task["baselines"], _NUMBER), f"{where}: baselines")
        if len(interval) != 2 or not all(is_a(one, _NUMBER) for one in interval):
            raise EvaluationError(f"{where}: confidence_interval_95 is not two numbers; evaluate again")
        if not all(_is_reference(one) for one in references):
            raise EvaluationError(
                f"{where}: reference_scores are not model, source and score; evaluate again"
            )
    return results


_NUMBER = (int, float)
_TASK_TYPES: KeyTypes = {
    "score": _NUMBER, "stderr": _NUMBER, "macro": _NUMBER, "metric": str, "protocol": str, "num_samples": int,
    "num_scored": int, "confidence_interval_95": list, "baselines": dict, "reference_scores": list,
}  # fmt: skip
"""What is read again of an entry of `tasks`."""


def _is_reference(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and is_a(value[0], (str,))
        and is_a(value[1], (str,))
        and is_a(value[2], _NUMBER)
    )


def join_runs(folders: Sequence[Path]) -> str:
    """Return one Markdown table of several runs, and the published scores of their tasks."""
    runs = [(folder.name, read_results(folder)) for folder in folders]
    lines = _table(_score_rows(runs))
    shown: dict[str, Mapping[str, Any]] = {}
    for _, results in runs:
        shown.update(results["tasks"])
    references = [["task", *row] for task in shown.values() for row in _references(task)[:1]][:1]
    references += [[name, *row] for name, task in shown.items() for row in _references(task)[1:]]
    if len(references) > 1:
        lines += ["", "Published scores:", "", *_table(references)]
    return "\n".join(lines) + "\n"


def _score_rows(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[str]]:
    rows = [
        [
            "run", "model", "task", "protocol", "metric", "score", "95 % interval", "macro", "samples",
            "without a model",
        ]
    ]  # fmt: skip
    for run, results in runs:
        for name, task in results["tasks"].items():
            low, high = task["confidence_interval_95"]
            baselines = ", ".join(f"{key} {value:.3f}" for key, value in task["baselines"].items())
            rows.append(
                [
                    run or "this",
                    _plain(results["model"]["name"]),
                    name,
                    task["protocol"],
                    task["metric"],
                    f"{task['score']:.4f} ± {task['stderr']:.4f}" if task["num_scored"] else "no labels",
                    f"{low:.3f} to {high:.3f}",
                    f"{task['macro']:.4f}",
                    str(task["num_samples"]),
                    baselines or "-",
                ]
            )
    return rows


def _groups_and_subsets(task: Mapping[str, Any]) -> list[list[str]]:
    rows = [["part", "score", "macro", "samples"]]
    for name, part in task["groups"].items():
        rows.append(
            [
                f"**{name}**",
                f"{part['score']:.4f} ± {part['stderr']:.4f}",
                f"{part['macro']:.4f}",
                str(part["num_samples"]),
            ]
        )
    for name, part in task["subsets"].items():
        rows.append([name, f"{part['score']:.4f} ± {part['stderr']:.4f}", "", str(part["num_samples"])])
    return rows


def _references(task: Mapping[str, Any]) -> list[list[str]]:
    return [
        ["model", "source", "score"],
        *([m, source, f"{score:.3f}"] for m, source, score in task["reference_scores"]),
    ]


def _plain(text: str) -> str:
    """Escape Markdown in a name."""
    return (
        "".join("\\" + c if c in "\\`*_[]<>|#" else c for c in text)
        if any(c in text for c in "`*[]<>|")
        else text
    )


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]
