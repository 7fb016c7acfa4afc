"""The report as one self-contained HTML page: tables, a bar chart, and samples as plain text."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ascendspeed_eval.tasks.samples import ScoredSample

MAX_SAMPLES = 20
MAX_CHARACTERS = 4000
BAR_HEIGHT, LABEL_WIDTH, BAR_WIDTH = 18, 260, 420
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1c2733; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { border: 1px solid #d4dbe2; padding: .25rem .6rem; }
th { background: #f2f5f8; text-align: left; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.score { font-size: 2.4rem; font-weight: 600; } .note { background: #fff6dd; padding: .5rem 1rem; }
pre { background: #f6f8fa; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { max-height: 20rem; overflow: auto; }
.right { color: #1a7f37; } .wrong { color: #b42318; } code { overflow-wrap: anywhere; }
"""


def html_report(results: Mapping[str, Any], notes: Sequence[str], scored: Sequence[ScoredSample]) -> str:
    """Return the page; all text of models and files is escaped."""
    model = results["model"]
    size = f"{model['num_parameters']:,} parameters" if model["num_parameters"] else "size unknown"
    parts = [f"<h1>{escape(model['name'])}</h1><p>{size}</p>"]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    for name, task in results["tasks"].items():
        parts.append(_task(name, task))
    parts.append("<h2>Samples</h2>" + "".join(_sample(one) for one in scored[:MAX_SAMPLES]))
    parts.append(f"<p>{len(scored)} in all; samples.jsonl has every one.</p>")
    parts.append("<h2>What produced these numbers</h2>" + _pairs({**results["run"], **model["details"]}))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(model["name"])}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _task(name: str, task: Mapping[str, Any]) -> str:
    low, high = task["confidence_interval_95"]
    score = f"{task['score']:.4f}" if task["num_scored"] else "no labels"
    default = ", the default" if task["is_default_protocol"] else ""
    lines = [
        f"<h2>{escape(name)}</h2>",
        f'<p><span class="score">{score}</span> {escape(task["metric"])}, {task["num_samples"]} samples, '
        f"95 % interval {low:.3f} to {high:.3f}, standard error {task['stderr']:.4f}, "
        f"average over subsets {task['macro']:.4f}</p>",
        f"<p>Protocol <b>{escape(task['protocol'])}</b>{default}: {escape(task['protocol_summary'])}.</p>",
    ]
    shown = {
        **task["metrics"],
        **{f"without a model: {key}": value for key, value in task["baselines"].items()},
    }
    lines.append(_table(["metric", "value"], [[key, f"{value:.4f}"] for key, value in shown.items()]))
    if len(task["subsets"]) > 1:
        bars = {**{f"[{key}]": part for key, part in task["groups"].items()}, **task["subsets"]}
        lines.append(_bar_chart(bars, task["baselines"].get("chance")))
        if task["groups"]:
            lines.append(f"<p>Groups in brackets are those of {escape(task['groups_source'])}.</p>")
    if task["reference_scores"]:
        rows = [[model, source, f"{value:.3f}"] for model, source, value in task["reference_scores"]]
        lines.append("<p>Published scores</p>" + _table(["model", "source", "score"], rows))
    return "".join(lines)


def _bar_chart(parts: Mapping[str, Mapping[str, Any]], chance: float | None) -> str:
    """Draw a bar with its standard error for each group and subset."""
    height = BAR_HEIGHT * len(parts) + 24
    lines = [
        f'<svg viewBox="0 0 {LABEL_WIDTH + BAR_WIDTH + 90} {height}" width="100%" role="img" '
        'font-size="12" font-family="system-ui, sans-serif">'
    ]
    for number, (name, part) in enumerate(parts.items()):
        y, width = number * BAR_HEIGHT + 4, part["score"] * BAR_WIDTH
        error = part["stderr"] * BAR_WIDTH
        colour = "#3b6ea5" if name.startswith("[") else "#8fb3d9"
        middle = y + 6
        left, right = LABEL_WIDTH + max(width - error, 0), LABEL_WIDTH + min(width + error, BAR_WIDTH)
        lines.append(
            f'<text x="{LABEL_WIDTH - 8}" y="{y + 10}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{LABEL_WIDTH}" y="{y}" width="{width:.1f}" height="12" fill="{colour}"/>'
            f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{middle}" y2="{middle}" stroke="#1c2733"/>'
            f'<text x="{LABEL_WIDTH + BAR_WIDTH + 8}" y="{y + 10}">{part["score"]:.3f} ({part["num_samples"]})</text>'
        )
    if chance is not None:
        x = LABEL_WIDTH + chance * BAR_WIDTH
        lines.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 20}" stroke="#b42318" stroke-dasharray="4 3"/>'
            f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle" fill="#b42318">chance</text>'
        )
    return "".join(lines) + "</svg>"


def _sample(one: ScoredSample) -> str:
    score = next(iter(one.scores.values()), None)
    kind = "right" if score == 1 else "wrong"
    if one.choices:
        shown = [
            f"{'→' if number == one.answer else ' '} {choice!r}: {value:.4f}"
            for number, (choice, value) in enumerate(zip(one.choices, one.logprobs, strict=True))
        ]
        answer = "\n".join(shown)
    else:
        answer = "\n---\n".join(one.outputs)
        thought = "\n---\n".join(one.removed)
        answer = (
            f"[removed before the answer was looked for:\n{_cut(thought)}]\n{answer}" if thought else answer
        )
    details = f"target {one.target!r}, scores {dict(one.scores)}, extracted {dict(one.extracted)}"
    return (
        f'<details><summary class="{kind}">{escape(one.id)}: {score}</summary>'
        f"<pre>{escape(_cut(one.prompt))}</pre><pre>{escape(_cut(answer))}</pre><p><code>{escape(_cut(details))}</code></p></details>"
    )


def _cut(text: str) -> str:
    """Keep the end of a long text, which has question and answer; say how much is missing."""
    return (
        text
        if len(text) <= MAX_CHARACTERS
        else f"[{len(text) - MAX_CHARACTERS} earlier characters]{text[-MAX_CHARACTERS:]}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{cells}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _pairs(values: Mapping[str, Any]) -> str:
    return _table(["setting", "value"], [[key, str(value)] for key, value in values.items()])
