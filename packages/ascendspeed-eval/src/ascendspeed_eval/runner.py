"""Evaluate a model on a task: write each scored sample at once, and resume an interrupted run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ascendspeed_eval import __version__
from ascendspeed_eval.aggregate import task_results
from ascendspeed_eval.answer_quality import quality
from ascendspeed_eval.ask import Results, ask
from ascendspeed_eval.conversations import conversations
from ascendspeed_eval.errors import EvaluationError, ScoringError
from ascendspeed_eval.evaluation import Evaluation
from ascendspeed_eval.model import EvaluatedModel, ModelDescription, RequestFailure
from ascendspeed_eval.output_folder import (
    FAILED,
    RESULTS,
    SAMPLES,
    append_failure,
    line_of,
    lock_folder,
    resume_samples,
    write_atomically,
    write_samples,
    write_submission,
)
from ascendspeed_eval.progress import Progress, log
from ascendspeed_eval.report import write_report
from ascendspeed_eval.tasks.samples import Sample, ScoredSample

FORMAT_VERSION = 2
MAX_FAILURES = 30
"""This number of samples that fail one after the other means that a server is gone, not that some answers are odd."""


def evaluate(
    evaluation: Evaluation, model: EvaluatedModel, folder: Path, max_failures: int = MAX_FAILURES
) -> dict[str, Any]:
    """Evaluate the model and write `samples.jsonl`, `results.json`, `report.md` and `report.html` to `folder`.

    An interrupted run with the same settings, data and model resumes: finished samples are not computed again. A sample
    that fails ends no run: `failed.jsonl` says why, `results.json` counts it, and the next start asks for it again.

    Args:
        evaluation: what `prepare_evaluation` returned.
        model: text in; text or log-probability out.
        folder: output folder, made if absent.
        max_failures: this number of samples that fail one after the other ends the run.

    Returns:
        The content of `results.json`.

    Raises:
        EvaluationError: the folder holds a run with other settings, data or model, another process writes to it, too
            many samples failed, or all of them.
    """
    if evaluation.chat is not None:
        asked = conversations(evaluation.chat, evaluation.samples, model)
        evaluation = replace(evaluation, samples=asked)
    samples = evaluation.samples
    positions = _positions(samples)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        description = model.describe()
        identity = _identity(evaluation, description)
        done = resume_samples(folder, identity)
        scored = {one.id: one for one in done}
        _check_resumed(folder, done, positions)
        if done:
            log(f"{folder}: {len(done)} of {len(samples)} samples are finished; resuming")
        missing = [one for one in samples if one.record.id not in scored]
        failed = _ask_and_write(evaluation, model, folder, missing, scored, max_failures)
        whole = sorted(scored.values(), key=lambda one: positions[one.id])
        if not whole:
            raise EvaluationError(
                f"all {len(failed)} samples failed, the first: {next(iter(failed.values()))}"
            )
        if [one.id for one in whole] != list(scored):
            write_samples(folder, whole)
        results = _results(evaluation, whole, identity, description)
        results["tasks"][evaluation.task.name] |= quality(whole, failed, evaluation)
        write_submission(folder, whole)
        write_atomically(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_report(folder, results, whole)
    return results


def _ask_and_write(
    evaluation: Evaluation,
    model: EvaluatedModel,
    folder: Path,
    missing: Sequence[Sample],
    scored: dict[str, ScoredSample],
    max_failures: int,
) -> dict[str, str]:
    """Ask for samples and write each at once; return why others failed, by their names."""
    failed: dict[str, str] = {}
    in_a_row = 0
    bar = Progress(evaluation.task.name, len(evaluation.samples), len(scored))
    (folder / FAILED).unlink(missing_ok=True)
    with (folder / SAMPLES).open("a", encoding="utf-8") as file:
        for answered in ask(evaluation, model, missing):
            for sample, results in answered:
                one = _scored(evaluation, sample, results)
                if isinstance(one, RequestFailure):
                    in_a_row += 1
                    failed[sample.record.id] = one.reason
                    log(f"{sample.record.id} failed: {one.reason}")
                    append_failure(folder, sample.record.id, sample.record.subset, one.reason)
                else:
                    in_a_row = 0
                    scored[one.id] = one
                    file.write(line_of(one))
            file.flush()
            bar.advance(len(answered))
            if in_a_row >= max_failures:
                raise EvaluationError(
                    f"{in_a_row} samples failed one after the other, the last: {list(failed.values())[-1]}; "
                    f"{len(scored)} of {len(evaluation.samples)} are kept, and the same command goes on from there"
                )
    return failed


def _scored(
    evaluation: Evaluation, sample: Sample, results: Results | RequestFailure
) -> ScoredSample | RequestFailure:
    """Return a sample's score, or why it has none."""
    if isinstance(results, RequestFailure):
        return results
    try:
        return evaluation.task.score(sample, results, evaluation.variant, evaluation.generation)
    except ScoringError as error:
        return RequestFailure(str(error))


def _positions(samples: Sequence[Sample]) -> dict[str, int]:
    """Return each sample's position by its name.

    Raises:
        EvaluationError: two have the same name.
    """
    positions: dict[str, int] = {}
    for number, one in enumerate(samples):
        if positions.setdefault(one.record.id, number) != number:
            raise EvaluationError(
                f"two records have the name {one.record.id}; give each its own, or leave out one of the files"
            )
    return positions


def _check_resumed(folder: Path, done: Sequence[ScoredSample], positions: Mapping[str, int]) -> None:
    names: set[str] = set()
    for number, one in enumerate(done, 1):
        if one.id not in positions or one.id in names:
            problem = "is there twice" if one.id in names else "is none of this run"
            raise EvaluationError(
                f"{folder / SAMPLES}, line {number}: sample {one.id} {problem}; delete the line"
            )
        names.add(one.id)


def _identity(evaluation: Evaluation, description: ModelDescription) -> dict[str, Any]:
    """Return everything that decides the scores; a run resumes only if all of it is equal."""
    asked = json.dumps(
        [[s.record.id, s.prompt, s.record.target] for s in evaluation.samples], ensure_ascii=False
    )
    digest = hashlib.sha256()
    for path in evaluation.benchmark.files:
        digest.update(path.read_bytes())
    return {
        "format_version": FORMAT_VERSION,
        "ascendspeed_eval": __version__,
        "task": evaluation.task.name,
        "task_version": evaluation.task.version,
        "protocol": evaluation.variant.name,
        "template_sha256": hashlib.sha256(evaluation.variant.template.encode()).hexdigest(),
        "data_sha256": digest.hexdigest(),
        "samples_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "model": description.name,
        "model_fingerprint": description.fingerprint,
        "model_details": dict(description.details),
        "settings": dict(evaluation.settings),
    }


def _results(
    evaluation: Evaluation,
    scored: Sequence[ScoredSample],
    identity: Mapping[str, Any],
    description: ModelDescription,
) -> dict[str, Any]:
    origin = {"hub": evaluation.data_origin, "recipe": evaluation.recipe}
    return {
        "format_version": FORMAT_VERSION,
        "tasks": {evaluation.task.name: task_results(evaluation, scored)},
        "model": {
            "name": description.name,
            "num_parameters": description.num_parameters,
            "fingerprint": description.fingerprint,
            "details": {**description.details, **getattr(description, "location", {})},
        },
        "run": {**identity, **{key: value for key, value in origin.items() if value is not None}},
    }
