"""The output folder of a run: `run.json`, `samples.jsonl`, `results.json` and `submission.json`.

Each sample is appended as soon as it is scored, so an interrupted run loses at most the batch in progress. Samples
without an answer are named in `failed.jsonl`.
"""

import fcntl
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, asdict, fields
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.progress import log
from ascendspeed_eval.small_files import KeyTypes, check_keys, is_a, parse_json, read_bytes, read_text
from ascendspeed_eval.tasks.samples import ScoredSample

SAMPLES, RESULTS, SETTINGS, SUBMISSION = "samples.jsonl", "results.json", "run.json", "submission.json"
FAILED = "failed.jsonl"
_SURROGATES = re.compile("[\ud800-\udfff]")


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
        earlier = parse_json(read_text(settings), str(settings))
        check_keys(earlier, {}, str(settings))
        different = differences(earlier, identity)
        if different:
            raise EvaluationError(
                f"{folder} holds a run with other settings (there and here): {'; '.join(different)}; choose another "
                "--output-dir, or give that run's settings to go on with it"
            )
    else:
        write_atomically(settings, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
    path = folder / SAMPLES
    if not path.is_file():
        return []
    # A killed process may have left half a character. Split at \n only: texts hold other line separators.
    *lines, rest = read_bytes(path).split(b"\n")
    done = [_sample(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    if rest:
        log(f"{path}: its last line is incomplete; that sample is computed again")
    write_samples(folder, done)
    return done


def line_of(record: ScoredSample | Mapping[str, Any]) -> str:
    """Return a record as a line of JSON; half a surrogate pair, which UTF-8 cannot hold, stays an escape."""
    fields = asdict(record) if isinstance(record, ScoredSample) else dict(record)
    text = json.dumps(fields, ensure_ascii=False)
    return _SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def write_samples(folder: Path, scored: Sequence[ScoredSample]) -> None:
    """Replace `samples.jsonl`."""
    write_atomically(folder / SAMPLES, "".join(map(line_of, scored)))


def append_failure(folder: Path, name: str, subset: str, reason: str) -> None:
    """Add a line to `failed.jsonl`: a sample without an answer, and why."""
    with (folder / FAILED).open("a", encoding="utf-8") as file:
        file.write(line_of({"id": name, "subset": subset, "reason": reason}))


_DIGESTS = {
    "template_sha256": "question template (--prompt-template)",
    "data_sha256": "content of the files in --task-data-path",
    "model_fingerprint": "set of weights",
}
"""Digests of an identity, and what it means when they differ."""
_EXPLAINED_BY_OTHERS = "samples_sha256"
"""The digest of all prompts, which differs whenever data, template or settings do."""


def differences(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> list[str]:
    """Say in what the identities of two runs differ: each setting with both values, digests by what they stand for."""
    found = []
    for key, value in later.items():
        before = earlier.get(key)
        if before == value or key == _EXPLAINED_BY_OTHERS:
            continue
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            names = dict.fromkeys([*before, *value])
            found += [
                f"{name} {before.get(name)!r} and {value.get(name)!r}"
                for name in names
                if before.get(name) != value.get(name)
            ]
        elif key in _DIGESTS:
            found.append(f"another {_DIGESTS[key]}")
        else:
            found.append(f"{key} {before!r} and {value!r}")
    if not found and earlier.get(_EXPLAINED_BY_OTHERS) != later.get(_EXPLAINED_BY_OTHERS):
        found.append("other prompts")
    return found


def read_samples(folder: Path) -> list[ScoredSample]:
    """Return the samples of a complete run.

    Raises:
        EvaluationError: the folder has no `samples.jsonl`.
    """
    path = folder / SAMPLES
    if not path.is_file():
        raise EvaluationError(f"{path} does not exist; the run in {folder} is not complete")
    lines = read_bytes(path).split(b"\n")
    return [_sample(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line]


_TYPES: KeyTypes = {
    "id": str, "subset": str, "prompt": str, "scores": dict, "truncated_tokens": int, "choices": list,
    "logprobs": list, "answer": (int, type(None)), "outputs": list, "extracted": dict, "finish_reasons": list,
    "marks": list, "messages": list, "removed": list,
}  # fmt: skip


def _sample(line: bytes, where: str) -> ScoredSample:
    """Return what a line of `samples.jsonl` says.

    Raises:
        EvaluationError: it is damaged, or another version wrote it.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{where} is not UTF-8 ({error.reason}); delete the line, or choose another --output-dir"
        ) from None
    given = parse_json(text, where, allow_surrogates=True)
    check_keys(given, {}, where)
    known = {one.name for one in fields(ScoredSample)}
    unknown = [key for key in given if key not in known]
    missing = [one.name for one in fields(ScoredSample) if _is_required(one) and one.name not in given]
    if unknown or missing:
        raise EvaluationError(
            f"{where}: {', '.join(unknown or missing)} is {'unknown' if unknown else 'missing'}; another version wrote "
            "it, or it is damaged: choose another --output-dir"
        )
    check_keys(given, {key: kind for key, kind in _TYPES.items() if key in given}, where)
    sample = ScoredSample(**given)
    numbers = [*sample.scores.values(), *sample.logprobs]
    texts = [*sample.choices, *sample.outputs, *sample.finish_reasons, *sample.marks, *sample.removed]
    is_whole = all(is_a(one, (str,)) for one in texts)
    is_whole = is_whole and all(is_a(one, (int, float)) and math.isfinite(one) for one in numbers)
    if not is_whole or (sample.answer is not None and not 0 <= sample.answer < len(sample.choices)):
        raise EvaluationError(f"{where}: a value has the wrong type; delete the line")
    return sample


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


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
