"""Put a task to a model, keep every answer as it comes, and go on where an earlier run stopped."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ascendspeed_eval import __version__
from ascendspeed_eval.aggregate import task_results
from ascendspeed_eval.errors import EvaluationError, UsageError, did_you_mean
from ascendspeed_eval.model import EvaluatedModel, ModelDescription
from ascendspeed_eval.progress import Progress, log
from ascendspeed_eval.report import write_report
from ascendspeed_eval.tasks.base import AskSettings, Benchmark, Sample, Scored, Task, TaskVariant

SAMPLES_PER_CALL = 64
SAMPLES, RESULTS, SETTINGS, SUBMISSION = "samples.jsonl", "results.json", "run.json", "submission.json"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Evaluation:
    """What is measured.

    Attributes:
        task: benchmark.
        protocol: how it is asked.
        benchmark: what was read.
        samples: prompts.
        ask: choices of the user that change answers.
        settings: further options that are recorded.
    """

    task: Task
    protocol: TaskVariant
    benchmark: Benchmark
    samples: Sequence[Sample]
    ask: AskSettings = field(default_factory=AskSettings)
    settings: Mapping[str, Any] = field(default_factory=dict)


def prepare(
    task: Task,
    protocol: TaskVariant,
    path: str,
    *,
    subsets: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    ask: AskSettings | None = None,
    seed: int = 1234,
) -> Evaluation:
    """Read the benchmark and make the prompts.

    Args:
        task: benchmark.
        protocol: how it is asked.
        path: its files.
        subsets: only these; names of groups stand for their subsets.
        limit: only the first so many samples of each subset.
        num_fewshot: examples instead of the protocol's number.
        ask: choices of the user that change answers.
        seed: recorded.
    """
    ask = ask or AskSettings(seed=seed)
    benchmark = task.read(path)
    known = list(dict.fromkeys(record.subset for record in benchmark.records))
    wanted = [one for name in subsets for one in task.groups.get(name, (name,))]
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"subset={name} is not there; there are {', '.join(known)}{did_you_mean(name, known)}"
            )
    records = [record for record in benchmark.records if not wanted or record.subset in wanted]
    if limit is not None:
        counts: dict[str, int] = {}
        kept = []
        for record in records:
            counts[record.subset] = counts.get(record.subset, 0) + 1
            if counts[record.subset] <= limit:
                kept.append(record)
        records = kept
    benchmark = Benchmark(records, benchmark.examples, benchmark.files)
    samples = task.samples(benchmark, protocol, num_fewshot)
    settings = {
        "limit": limit,
        "subsets": list(subsets),
        "num_fewshot": protocol.num_fewshot if num_fewshot is None else num_fewshot,
        "max_new_tokens": ask.max_new_tokens or protocol.max_new_tokens,
        "num_samples": ask.num_samples,
        "temperature": ask.temperature,
        "seed": seed,
    }
    return Evaluation(task, protocol, benchmark, samples, ask, settings)


def run(evaluation: Evaluation, model: EvaluatedModel, folder: Path) -> dict[str, Any]:
    """Measure, and leave `samples.jsonl`, `results.json`, `report.md` and `report.html` in `folder`.

    Samples that are already there, from the same settings, data and model, are not asked again.

    Returns:
        The content of `results.json`.

    Raises:
        EvaluationError: the folder belongs to another measurement or run.
    """
    samples = evaluation.samples
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        description = model.describe()
        identity = _identity(evaluation, description)
        done = _resume(folder, identity)
        if done:
            log(f"{folder}: {len(done)} of {len(samples)} samples are there already")
        scored = list(done)
        bar = Progress(evaluation.task.name, len(samples), len(done))
        with (folder / SAMPLES).open("a", encoding="utf-8") as file:
            for start in range(len(done), len(samples), SAMPLES_PER_CALL):
                batch = samples[start : start + SAMPLES_PER_CALL]
                for answer in evaluation.task.ask(model, batch, evaluation.protocol, evaluation.ask):
                    scored.append(answer)
                    file.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
                file.flush()
                bar.advance(len(batch))
        results = _results(evaluation, scored, identity, description)
        _write_submission(folder, scored)
        write_atomically(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_report(folder, results, scored)
    return results


def _identity(evaluation: Evaluation, description: ModelDescription) -> dict[str, Any]:
    """Everything that decides the numbers."""
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
        "protocol": evaluation.protocol.name,
        "template_sha256": hashlib.sha256(evaluation.protocol.template.encode()).hexdigest(),
        "data_sha256": digest.hexdigest(),
        "samples_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "model": description.name,
        "model_fingerprint": description.fingerprint,
        "model_details": dict(description.details),
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
        write_atomically(settings, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
    path = folder / SAMPLES
    if not path.is_file():
        return []
    done = []
    # Bytes, as a process that was killed may have left half a character behind; lines end in \n alone, as texts hold
    # other characters that split lines.
    for line in path.read_bytes().split(b"\n"):
        try:
            done.append(Scored(**json.loads(line)))
        except ValueError:
            break
    write_atomically(path, "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in done))
    return done


def read_samples(folder: Path) -> list[Scored]:
    """Return the samples of a complete run."""
    path = folder / SAMPLES
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist; the run in {folder} is not complete")
    return [Scored(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _results(
    evaluation: Evaluation,
    scored: Sequence[Scored],
    identity: Mapping[str, Any],
    description: ModelDescription,
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "tasks": {
            evaluation.task.name: task_results(
                evaluation.task, evaluation.protocol, evaluation.benchmark.records, scored
            )
        },
        "model": {
            "name": description.name,
            "num_parameters": description.num_parameters,
            "fingerprint": description.fingerprint,
            "details": dict(description.details),
        },
        "run": dict(identity),
    }


def _write_submission(folder: Path, scored: Sequence[Scored]) -> None:
    """Write the answers to questions without labels in the form that C-Eval takes: subject, number, letter."""
    unlabelled = [one for one in scored if one.target == []]
    if not unlabelled:
        return
    answers: dict[str, dict[str, str]] = {}
    for one in unlabelled:
        found = one.choices[one.answer] if one.answer is not None else one.extracted.get("flexible")
        letter = str(found or "").strip()
        answers.setdefault(one.subset, {})[one.id.rpartition("/")[2]] = letter
    write_atomically(folder / SUBMISSION, json.dumps(answers, indent=2, ensure_ascii=False) + "\n")
    log(
        f"{len(unlabelled)} questions have no labels and no score: {folder / SUBMISSION} is what the authors take"
    )


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
