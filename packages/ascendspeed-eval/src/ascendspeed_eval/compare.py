"""Compare two runs on the same samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.output_folder import differences, read_samples
from ascendspeed_eval.report import read_results
from ascendspeed_eval.statistics import interval, mcnemar, mean_error
from ascendspeed_eval.tasks.samples import ScoredSample

SHOWN = 20


def compare_runs(first: Path, second: Path, shown: int = SHOWN) -> str:
    """Return a paired significance test in Markdown, and the samples whose scores changed.

    Raises:
        EvaluationError: a run is incomplete, or the two runs used different data.
    """
    runs = [read_results(first), read_results(second)]
    if runs[0]["run"]["data_sha256"] != runs[1]["run"]["data_sha256"]:
        raise EvaluationError(f"{first} and {second} used different data; compare runs on the same files")
    ours = {one.id: one for one in read_samples(first)}
    theirs = {one.id: one for one in read_samples(second)}
    both = [name for name in ours if name in theirs and ours[name].scores and theirs[name].scores]
    if not both:
        raise EvaluationError(f"{first} and {second} have no sample in common")
    pairs = [(ours[name], theirs[name]) for name in both]
    changes = [(a, b) for a, b in pairs if _score(a) != _score(b)]
    gained = sum(_score(b) > _score(a) for a, b in changes)
    lost = len(changes) - gained
    means = [sum(_score(one) for one in column) / len(pairs) for column in zip(*pairs, strict=True)]
    error = mean_error([_score(b) - _score(a) for a, b in pairs])
    constants = [_constant_answer(run) for run in runs]
    settings = differences(runs[0]["run"], runs[1]["run"])
    left_out = len(ours) + len(theirs) - 2 * len(both)
    lines = [
        f"| | {first.name} | {second.name} |",
        "|---|---|---|",
        f"| model | {runs[0]['model']['name']} | {runs[1]['model']['name']} |",
        f"| protocol | {runs[0]['run']['protocol']} | {runs[1]['run']['protocol']} |",
        f"| score | {means[0]:.4f} | {means[1]:.4f} |",
        f"| a constant answer | {constants[0]} | {constants[1]} |",
        f"| 95 % interval | {_interval([_score(a) for a, _ in pairs])} | {_interval([_score(b) for _, b in pairs])} |",
        "",
        f"{len(both)} samples in common"
        + (f", {left_out} occur in one run only and are left out." if left_out else "."),
        f"Difference {means[1] - means[0]:+.4f}, paired standard error {error:.4f}; {gained} samples gained, {lost} "
        f"lost; exact McNemar test p = {mcnemar(gained, lost):.4f}.",
    ]
    lines += [
        "",
        f"Settings that differ: {'; '.join(settings)}." if settings else "Their settings are the same.",
    ]
    if changes:
        lines += ["", "| sample | before | after | answer before | answer after |", "|---|---|---|---|---|"]
        lines += [
            f"| {a.id} | {_score(a):g} | {_score(b):g} | {_answer(a)} | {_answer(b)} |"
            for a, b in changes[:shown]
        ]
    if len(changes) > shown:
        lines.append(f"\n{len(changes) - shown} more changed; --show {len(changes)} lists all.")
    return "\n".join(lines) + "\n"


def _constant_answer(results: Mapping[str, Any]) -> str:
    """Return what always giving the most frequent answer would score on all samples of a run."""
    scores = [task["baselines"].get("majority") for task in results["tasks"].values()]
    return ", ".join("-" if score is None else f"{score:.4f}" for score in scores)


def _score(one: ScoredSample) -> float:
    return next(iter(one.scores.values()))


def _interval(values: Sequence[float]) -> str:
    low, high = interval(values)
    return f"{low:.3f} to {high:.3f}"


def _answer(one: ScoredSample) -> str:
    text = one.choices[one.answer] if one.answer is not None else str(next(iter(one.extracted.values()), ""))
    return text.strip().replace("|", "\\|").replace("\n", " ")[:40]
