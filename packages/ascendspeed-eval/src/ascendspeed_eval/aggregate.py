"""Aggregate scores of samples into scores of subsets, groups and tasks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import fsum
from typing import Any

from ascendspeed_eval.evaluation import Evaluation
from ascendspeed_eval.protocol import describe_protocol
from ascendspeed_eval.statistics import interval, mean_error
from ascendspeed_eval.tasks.samples import ScoredSample


def task_results(evaluation: Evaluation, scored: Sequence[ScoredSample]) -> dict[str, Any]:
    """Return the entry of a task in `results.json`.

    `score` is the mean over all samples (micro average); `macro` is the mean over subsets, which gives small and large
    subsets the same weight. Questions without labels have no score.
    """
    task, variant, records = evaluation.task, evaluation.variant, evaluation.benchmark.records
    labelled = [one for one in scored if one.target != []]
    values = [one.scores for one in labelled]
    # Samples of one task may have different metrics (AGIEval's cloze questions); the first is a sample's main metric.
    main = [next(iter(one.values())) for one in values]
    asked = {record.id for record in records} & {one.id for one in labelled}
    by_subset: dict[str, list[float]] = {}
    for one, value in zip(labelled, main, strict=True):
        by_subset.setdefault(one.subset, []).append(value)
    groups_source, groups = task.groups_of(variant)
    names = list(dict.fromkeys(name for one in values for name in one))
    return {
        "score": _mean(main),
        "metric": names[0] if names else variant.main,
        "num_samples": len(scored),
        "num_scored": len(labelled),
        "stderr": mean_error(main),
        "confidence_interval_95": list(interval(main)) if main else [0.0, 0.0],
        "macro": _mean([_mean(part) for part in by_subset.values()]),
        "metrics": {name: _mean([one[name] for one in values if name in one]) for name in names},
        "groups": _groups(groups, by_subset),
        "groups_source": groups_source,
        "subsets": {
            name: {"score": _mean(part), "num_samples": len(part), "stderr": mean_error(part)}
            for name, part in by_subset.items()
        },
        "protocol": variant.name,
        "protocol_summary": describe_protocol(task, variant, evaluation.samples, evaluation.settings),
        "is_default_protocol": variant.name == task.default_variant,
        "baselines": task.baselines([r for r in records if r.id in asked], variant),
        "truncated_samples": sum(one.truncated_tokens > 0 for one in scored),
        "answers": _answers(labelled),
        "reference_scores": [list(line) for line in task.reference_scores],
    }


def _groups(members: Mapping[str, Sequence[str]], by_subset: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    groups = {}
    for name, subsets in members.items():
        parts = [by_subset[subset] for subset in subsets if subset in by_subset]
        whole = [value for part in parts for value in part]
        if whole:
            groups[name] = {
                "score": _mean(whole),
                "macro": _mean([_mean(part) for part in parts]),
                "num_samples": len(whole),
                "stderr": mean_error(whole),
            }
    return groups


def _answers(scored: Sequence[ScoredSample]) -> dict[str, int]:
    """Count the answers by choice if all samples share the choices; else count texts without an answer."""
    shown = {tuple(one.choices) for one in scored}
    if len(shown) == 1 and (choices := next(iter(shown))):
        counts = Counter(one.answer for one in scored)
        return {choice.strip(): counts[number] for number, choice in enumerate(choices)}
    texts = [one for one in scored if one.outputs and "strict" in one.extracted]
    missing = sum(one.extracted["strict"] in (None, "", [], "[invalid]") for one in texts)
    return {"generated": len(texts), "no answer found": missing} if texts else {}


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values) if values else 0.0
