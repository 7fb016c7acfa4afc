"""The output folder of a run: `run.json`, `samples.jsonl`, `results.json` and `submission.json`.

Each sample is appended as soon as it is scored, so an interrupted run loses at most the batch in progress.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.progress import log
from ascendspeed_eval.tasks.base import ScoredSample

SAMPLES, RESULTS, SETTINGS, SUBMISSION = "samples.jsonl", "results.json", "run.json", "submission.json"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, so that a second run on it fails; the lock ends with the process."""
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
    """Replace a file; a crash leaves either the old or the new content."""
    scratch = path.with_name(path.name + ".incomplete")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def resume_samples(folder: Path, identity: Mapping[str, Any]) -> list[ScoredSample]:
    """Return the finished samples of an interrupted run with the same identity; an incomplete last line is dropped."""
    settings = folder / SETTINGS
    if settings.is_file():
        earlier = json.loads(settings.read_text(encoding="utf-8"))
        for key, value in identity.items():
            if earlier.get(key) != value:
                raise EvaluationError(
                    f"{folder} holds a run with {key}={earlier.get(key)!r}, but this run has "
                    f"{key}={value!r}; choose another --output-dir"
                )
    else:
        write_atomically(settings, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
    path = folder / SAMPLES
    if not path.is_file():
        return []
    done = []
    # Read bytes: a killed process may have left half a character. Split at \n only: texts hold other line separators.
    for line in path.read_bytes().split(b"\n"):
        try:
            done.append(ScoredSample(**json.loads(line)))
        except ValueError:
            break
    write_atomically(path, "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in done))
    return done


def read_samples(folder: Path) -> list[ScoredSample]:
    """Return the samples of a complete run.

    Raises:
        EvaluationError: the folder has no `samples.jsonl`.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist; the run in {folder} is not complete")
    return [ScoredSample(**json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write_submission(folder: Path, scored: Sequence[ScoredSample]) -> None:
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
        f"{len(unlabelled)} questions have no labels and so no score; submit {folder / SUBMISSION} to the authors"
    )
