"""Evaluate a model on a task: write each scored sample at once, and resume an interrupted run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ascendspeed_eval import __version__
from ascendspeed_eval.aggregate import task_results
from ascendspeed_eval.evaluation import Evaluation
from ascendspeed_eval.model import EvaluatedModel, ModelDescription
from ascendspeed_eval.output_folder import (
    RESULTS,
    SAMPLES,
    lock_folder,
    resume_samples,
    write_atomically,
    write_submission,
)
from ascendspeed_eval.progress import Progress, log
from ascendspeed_eval.report import write_report
from ascendspeed_eval.tasks.base import ScoredSample

SAMPLES_PER_CALL = 64
FORMAT_VERSION = 2


def evaluate(evaluation: Evaluation, model: EvaluatedModel, folder: Path) -> dict[str, Any]:
    """Evaluate the model and write `samples.jsonl`, `results.json`, `report.md` and `report.html` to `folder`.

    An interrupted run with the same settings, data and model resumes: finished samples are not computed again.

    Args:
        evaluation: what `prepare_evaluation` returned.
        model: text in; text or log-probability out.
        folder: output folder, made if absent.

    Returns:
        The content of `results.json`.

    Raises:
        EvaluationError: the folder holds a run with other settings, data or model, or another process writes to it.
    """
    samples = evaluation.samples
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        description = model.describe()
        identity = _identity(evaluation, description)
        done = resume_samples(folder, identity)
        if done:
            log(f"{folder}: {len(done)} of {len(samples)} samples are finished; resuming")
        scored = list(done)
        bar = Progress(evaluation.task.name, len(samples), len(done))
        with (folder / SAMPLES).open("a", encoding="utf-8") as file:
            for start in range(len(done), len(samples), SAMPLES_PER_CALL):
                batch = samples[start : start + SAMPLES_PER_CALL]
                for answer in evaluation.task.evaluate_samples(
                    model, batch, evaluation.variant, evaluation.generation
                ):
                    scored.append(answer)
                    file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
                file.flush()
                bar.advance(len(batch))
        results = _results(evaluation, scored, identity, description)
        write_submission(folder, scored)
        write_atomically(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_report(folder, results, scored)
    return results


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
    return {
        "format_version": FORMAT_VERSION,
        "tasks": {evaluation.task.name: task_results(evaluation, scored)},
        "model": {
            "name": description.name,
            "num_parameters": description.num_parameters,
            "fingerprint": description.fingerprint,
            "details": dict(description.details),
        },
        "run": dict(identity),
    }
