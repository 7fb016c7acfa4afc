"""Put a task to a model, keep every answer as it comes, and go on where an earlier run stopped."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ascendspeed_eval import __version__
from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.model import EvaluatedModel, ModelDescription
from ascendspeed_eval.progress import Progress, log
from ascendspeed_eval.report import write_report
from ascendspeed_eval.statistics import standard_error, wilson_interval
from ascendspeed_eval.tasks.base import Protocol_, Sample, Scored, Task

SAMPLES_PER_CALL = 16
SAMPLES, RESULTS, SETTINGS = "samples.jsonl", "results.json", "run.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """What is measured.

    Attributes:
        task: benchmark.
        protocol: how it is asked.
        data: its files.
        limit: only the first so many samples, or `None` for all.
        settings: further options that can change a score.
    """

    task: Task
    protocol: Protocol_
    data: Sequence[Path]
    limit: int | None
    settings: Mapping[str, Any]


def run(evaluation: Evaluation, model: EvaluatedModel, folder: Path) -> dict[str, Any]:
    """Measure, and leave `samples.jsonl`, `results.json` and `report.md` in `folder`.

    Samples that are already there, from the same settings, data and model, are not asked again.

    Returns:
        The content of `results.json`.

    Raises:
        EvaluationError: the data cannot be read, or the folder belongs to another measurement or run.
    """
    samples = evaluation.task.load(evaluation.data, evaluation.protocol)[: evaluation.limit]
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        description = model.describe()
        identity = _identity(evaluation, samples, description)
        done = _resume(folder, identity)
        if done:
            log(f"{folder}: {len(done)} of {len(samples)} samples are there already")
        scored = list(done)
        bar = Progress(evaluation.task.name, len(samples), len(done))
        with (folder / SAMPLES).open("a", encoding="utf-8") as file:
            for start in range(len(done), len(samples), SAMPLES_PER_CALL):
                batch = samples[start : start + SAMPLES_PER_CALL]
                for answer in evaluation.task.ask(model, batch, evaluation.protocol):
                    scored.append(answer)
                    file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
                file.flush()
                bar.advance(len(batch))
        results = _results(evaluation, scored, identity, description)
        write_atomically(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_report(folder, results)
    return results


def _identity(
    evaluation: Evaluation, samples: Sequence[Sample], description: ModelDescription
) -> dict[str, Any]:
    """Everything that decides the numbers."""
    asked = json.dumps([[s.id, s.prompt, s.target] for s in samples], ensure_ascii=False)
    return {
        "format_version": FORMAT_VERSION,
        "ascendspeed_eval": __version__,
        "task": evaluation.task.name,
        "task_version": evaluation.task.version,
        "protocol": evaluation.protocol.name,
        "template_sha256": hashlib.sha256(evaluation.protocol.template.encode()).hexdigest(),
        "data_sha256": hashlib.sha256(b"".join(path.read_bytes() for path in evaluation.data)).hexdigest(),
        "samples_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "model": description.name,
        "model_fingerprint": description.fingerprint,
        "settings": dict(evaluation.settings),
    }


def _resume(folder: Path, identity: Mapping[str, Any]) -> list[Scored]:
    """Return the samples of an interrupted run with the same identity; a line cut short is dropped."""
    settings = folder / SETTINGS
    if settings.is_file():
        earlier = json.loads(settings.read_text(encoding="utf-8"))
        for key, value in identity.items():
            if earlier.get(key) != value:
                raise EvaluationError(
                    f"{folder} holds a run with {key}={earlier.get(key)!r}, this one has {value!r}; "
                    "choose another --output-dir"
                )
    else:
        write_atomically(settings, json.dumps(identity, indent=2) + "\n")
    path = folder / SAMPLES
    if not path.is_file():
        return []
    done = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            done.append(Scored(**json.loads(line)))
        except json.JSONDecodeError:
            break
    write_atomically(path, "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in done))
    return done


def _results(
    evaluation: Evaluation,
    scored: Sequence[Scored],
    identity: Mapping[str, Any],
    description: ModelDescription,
) -> dict[str, Any]:
    right = sum(sample.correct for sample in scored)
    score = right / len(scored)
    low, high = wilson_interval(right, len(scored))
    return {
        "format_version": FORMAT_VERSION,
        "tasks": {
            evaluation.task.name: {
                "score": score,
                "metric": evaluation.task.metric,
                "num_samples": len(scored),
                "stderr": standard_error(score, len(scored)),
                "confidence_interval_95": [low, high],
                "protocol": evaluation.protocol.name,
                "protocol_summary": evaluation.protocol.summary,
                "baselines": evaluation.task.baselines(scored),
                "truncated_samples": sum(sample.truncated_tokens > 0 for sample in scored),
                "answers": {
                    choice.strip(): sum(sample.answer == number for sample in scored)
                    for number, choice in enumerate(evaluation.protocol.choices)
                },
            }
        },
        "model": {
            "name": description.name,
            "num_parameters": description.num_parameters,
            "fingerprint": description.fingerprint,
            "details": dict(description.details),
        },
        "run": dict(identity),
    }


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Refuse a second run in the same folder; the lock vanishes with the process."""
    with (folder / "run.lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise EvaluationError(
                f"{folder} is being written by another run (process {file.read().strip()}); wait for it or choose "
                "another --output-dir"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            (folder / "run.lock").unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a crash leaves the old or the new content."""
    scratch = path.with_name(path.name + ".incomplete")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
