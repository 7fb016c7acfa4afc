"""What a score leaves out: samples without an answer, answers that were cut or withheld, answers in another form."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import fsum
from typing import Any

from ascendspeed_eval.evaluation import Evaluation
from ascendspeed_eval.tasks.answer_marks import FORM_MARKS, INCOMPLETE_MARKS
from ascendspeed_eval.tasks.samples import ScoredSample

FEW_TOKENS = 8
"""A protocol that asks for so few tokens expects answers to reach its limit."""


def quality(
    scored: Sequence[ScoredSample], failed: Mapping[str, str], evaluation: Evaluation
) -> dict[str, Any]:
    """Return the entries of a task in `results.json` that say how far its score can be trusted.

    `score_of_complete` is the mean over the samples whose texts were neither cut nor withheld, nor hold only reasoning.
    """
    limit = evaluation.generation.max_new_tokens or evaluation.variant.max_new_tokens
    labelled = [one for one in scored if one.target != []]
    marks = Counter(mark for one in scored for mark in one.marks)
    reasons = Counter(reason for one in scored for reason in one.finish_reasons)
    expected = {"length"} if limit <= FEW_TOKENS else set()
    complete = [one for one in labelled if not set(one.marks) & (INCOMPLETE_MARKS.keys() - expected)]
    values = [next(iter(one.scores.values())) for one in complete]
    return {
        "num_failed": len(failed),
        "first_failure": next(iter(failed.values()), None),
        "finish_reasons": dict(sorted(reasons.items())),
        "marks": dict(sorted(marks.items())),
        "max_new_tokens": limit,
        "num_complete": len(complete),
        "score_of_complete": fsum(values) / len(values) if values else None,
    }


def notes(name: str, task: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a reader must know of a task's samples, from its entry in `results.json`."""
    if task.get("num_failed"):
        whole = task["num_samples"] + task["num_failed"]
        yield (
            f"{name}: {task['num_failed']} of {whole} samples failed and have no score (failed.jsonl); the same "
            f"command asks for them again. The first: {task['first_failure']}"
        )
    marks, limit = task.get("marks", {}), task.get("max_new_tokens", 0)
    shown = INCOMPLETE_MARKS | FORM_MARKS
    found = {mark: count for mark, count in marks.items() if mark in shown}
    if limit <= FEW_TOKENS:
        found.pop("length", None)
    for mark, count in found.items():
        detail = f" (max_new_tokens={limit})" if mark == "length" else ""
        yield f"{name}: {count} of {task['num_samples']} answers {shown[mark]}{detail}."
    if found.keys() & INCOMPLETE_MARKS:
        score = task["score_of_complete"]
        without = f"{score:.4f}" if score is not None else "unknown, as none is left"
        yield (
            f"{name}: the score is {task['score']:.4f} with these answers and {without} without them "
            f"({task['num_complete']} samples)."
        )
