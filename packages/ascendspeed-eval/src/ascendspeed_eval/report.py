"""Say what was measured, in Markdown, with what produced each number."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import EvaluationError

TOY_PARAMETERS = 100_000_000
REPORT = "report.md"


def warnings(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a reader of the scores must know."""
    parameters = results["model"]["num_parameters"]
    if parameters is not None and parameters < TOY_PARAMETERS:
        yield (
            f"This is a toy model ({parameters:,} parameters): its scores say nothing about ability, only that "
            "everything runs."
        )
    for name, task in results["tasks"].items():
        if task["truncated_samples"]:
            yield f"{name}: {task['truncated_samples']} prompts did not fit and lost their beginning."
        best = max(task["baselines"].values())
        if task["confidence_interval_95"][0] <= best:
            yield f"{name}: the score is not clearly above {best:.3f}, which needs no model."


def markdown(results: Mapping[str, Any]) -> str:
    """Return the report of one run."""
    model = results["model"]
    size = f", {model['num_parameters']:,} parameters" if model["num_parameters"] else ""
    lines = [f"# {model['name']}{size}", ""]
    lines += [f"> {warning}" for warning in warnings(results)]
    lines += ["", *_table(_rows([("", results)])), ""]
    for name, task in results["tasks"].items():
        lines.append(
            f"- {name}, protocol `{task['protocol']}`: {task['protocol_summary']}. Answers: {task['answers']}."
        )
    lines += ["", "What produced these numbers:", ""]
    lines += [f"- {key}: `{value}`" for key, value in {**results["run"], **model["details"]}.items()]
    return "\n".join(lines) + "\n"


def write_report(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `report.md`."""
    (folder / REPORT).write_text(markdown(results), encoding="utf-8")


def joined(folders: Sequence[Path]) -> str:
    """Return one table of several runs."""
    runs = []
    for folder in folders:
        path = folder / "results.json"
        if not path.is_file():
            raise EvaluationError(f"{path} does not exist; the run in {folder} is not complete")
        runs.append((folder.name, json.loads(path.read_text(encoding="utf-8"))))
    return "\n".join(_table(_rows(runs))) + "\n"


def _rows(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[str]]:
    rows = [
        ["run", "model", "task", "protocol", "metric", "score", "95 % interval", "samples", "without a model"]
    ]
    for run, results in runs:
        for name, task in results["tasks"].items():
            low, high = task["confidence_interval_95"]
            baselines = ", ".join(f"{key} {value:.3f}" for key, value in task["baselines"].items())
            rows.append(
                [
                    run or "this",
                    results["model"]["name"],
                    name,
                    task["protocol"],
                    task["metric"],
                    f"{task['score']:.4f} ± {task['stderr']:.4f}",
                    f"{low:.3f} to {high:.3f}",
                    str(task["num_samples"]),
                    baselines,
                ]
            )
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]
