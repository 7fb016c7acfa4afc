"""What a run has done, so that the same command can go on after it was cut off.

`<output prefix>.journal` holds one JSON object per line: first what decides the output, then, after every few shards,
how far each file was flushed to the disk and which place of the input that belongs to. A run that finds the journal of
the same job cuts its files off at the last line and goes on there. A file of the input that was changed since counts
from its beginning, so a damaged line can be repaired without losing the files before it.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.indexed import WriterState

FORMAT_VERSION = 1
SHARE_OF_TIME = 0.1
"""How much of a run may go into flushing: with a slow disk lines are written more seldom."""


@dataclass(frozen=True)
class Commit:
    """One line: everything before is on the disk.

    Attributes:
        file: number of the input that was being read.
        place: byte or record of it that comes next.
        outputs: state of each output file.
        counts: what was counted until then, by output.
        renaming: whether the outputs are complete and only get their names.
    """

    file: int = 0
    place: int = 0
    outputs: dict[str, WriterState] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    renaming: bool = False


class Journal:
    """The journal of one output.

    Args:
        path: the file.
        job: what decides the output, besides the inputs.
        inputs: identity of each input: name, size, time of change.
    """

    def __init__(self, path: Path, job: dict[str, Any], inputs: list[list[Any]]) -> None:
        self.path = path
        self._job, self.inputs = job, inputs
        self._committed_at = time.monotonic()
        self._seconds = 0.0

    def resume(self) -> Commit | None:
        """Return where to go on, or `None` if there is no journal; lines that do not hold any more are dropped.

        Raises:
            AscendSpeedError: the journal is that of another job.
        """
        usable = self._usable()
        if usable is None:
            return None
        self._rewrite(usable)
        return usable[-1] if usable else Commit()

    def documents_kept(self) -> int:
        """Return how many documents of each output the next run will find."""
        usable = self._usable()
        states = list(usable[-1].outputs.values()) if usable else []
        return states[0].num_documents if states else 0

    def _usable(self) -> list[Commit] | None:
        """Return the lines that hold for the job and the inputs as they are, `None` if there is no journal."""
        if not self.path.is_file():
            return None
        lines = _whole_lines(self.path)
        if not lines or lines[0].get("format_version") != FORMAT_VERSION:
            raise self._other_job("it was written by another version")
        head = lines[0]
        for key, value in self._job.items():
            if head["job"].get(key) != value:
                raise self._other_job(f"{key} was {_short(head['job'].get(key))}, is {_short(value)}")
        known = head["inputs"]
        if [entry[0] for entry in known] != [entry[0] for entry in self.inputs]:
            raise self._other_job("it read other files")
        changed = [number for number, entry in enumerate(known) if entry != self.inputs[number]]
        first_changed = min(changed, default=len(known))
        commits = [_commit_of(line) for line in lines[1:]]
        return [
            commit
            for commit in commits
            if commit.file < first_changed or (commit.file == first_changed and commit.place == 0)
        ]

    def _other_job(self, difference: str) -> AscendSpeedError:
        return AscendSpeedError(
            f"{self.path} is that of an unfinished run with other settings ({difference}); give its command again to "
            "go on with it, or --overwrite to discard it"
        )

    def start(self) -> None:
        """Begin anew."""
        self._rewrite([])

    def _rewrite(self, commits: list[Commit]) -> None:
        head = {"format_version": FORMAT_VERSION, "job": self._job, "inputs": self.inputs}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".new")
        with scratch.open("w", encoding="utf-8") as file:
            for line in (head, *map(_line_of, commits)):
                file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.path)

    def is_due(self) -> bool:
        """Whether enough time has passed since the last line for another one."""
        return time.monotonic() - self._committed_at >= self._seconds / SHARE_OF_TIME

    def commit(self, commit: Commit, flush: Any) -> None:
        """Flush the outputs by calling `flush`, then say so."""
        started = time.monotonic()
        flush()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_line_of(commit)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._committed_at = time.monotonic()
        self._seconds = self._committed_at - started

    def remove(self) -> None:
        """Forget the run."""
        self.path.unlink(missing_ok=True)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal; the last one may have been cut off."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            break
        found.append(value)
    return found


def _line_of(commit: Commit) -> dict[str, Any]:
    return {
        "file": commit.file,
        "place": commit.place,
        "outputs": {name: list(vars(state).values()) for name, state in commit.outputs.items()},
        "counts": commit.counts,
        "renaming": commit.renaming,
    }


def _commit_of(line: dict[str, Any]) -> Commit:
    outputs = {name: WriterState(*numbers) for name, numbers in line["outputs"].items()}
    return Commit(line["file"], line["place"], outputs, line["counts"], line["renaming"])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
