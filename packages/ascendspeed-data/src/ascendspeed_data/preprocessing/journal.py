"""The journal of a preprocessing run: the same command resumes from it after an interruption.

`<output prefix>.journal` has one JSON object per line. The first line holds the settings that decide the output. A
commit follows every few shards: the flushed size of each output file, and the position in the input up to which it
was read. A run with the same settings truncates its files to the last commit and continues there. If an input file has
changed since, the run reads that file again from its start. So users can repair a damaged line and resume.
"""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, DataError
from ascendspeed_data.indexed import WriterState
from ascendspeed_data.small_files import parse_json, read_text

FORMAT_VERSION = 2
MAX_FLUSH_TIME_SHARE = 0.1
"""Maximum share of the time spent on flushing; a slow disk gets fewer commits."""


@dataclass(frozen=True)
class Commit:
    """A line of the journal: all documents before this position are on the disk.

    Attributes:
        input_index: index of the input that was being read.
        offset: its next byte or record.
        outputs: state of each output file.
        counts: counts so far, by output.
        renaming: whether the outputs are complete and only need their final names.
    """

    input_index: int = 0
    offset: int = 0
    outputs: dict[str, WriterState] = field(default_factory=dict)
    counts: dict[str, dict[str, Any]] = field(default_factory=dict)
    renaming: bool = False


class Journal:
    """The journal of one output.

    Args:
        path: the journal file.
        job: settings that decide the output.
        inputs: name, size and modification time of each input.
    """

    def __init__(self, path: Path, job: dict[str, Any], inputs: list[list[Any]]) -> None:
        self.path = path
        self._job, self.inputs = job, inputs
        self._committed_at = time.monotonic()
        self._seconds = 0.0

    def resume(self) -> Commit | None:
        """Return the last valid commit, or `None` if there is no journal; later commits are dropped.

        Raises:
            AscendSpeedError: the journal belongs to a run with other settings.
        """
        usable = self._usable()
        if usable is None:
            return None
        self._rewrite(usable)
        return usable[-1] if usable else Commit()

    def documents_kept(self) -> int:
        """Return the number of documents after which the next run resumes."""
        usable = self._usable()
        states = list(usable[-1].outputs.values()) if usable else []
        return states[0].num_documents if states else 0

    def _usable(self) -> list[Commit] | None:
        """Return the commits that are valid for these settings and inputs; `None` if there is no journal."""
        if not self.path.is_file():
            return None
        head, lines = _read(self.path)
        for key, value in self._job.items():
            if head.job.get(key) != value:
                raise self._other_job(f"{key} was {_short(head.job.get(key))}, now {_short(value)}")
        known, inputs = (
            [[str(Path(name).resolve()), *values] for name, *values in entries]
            for entries in (head.inputs, self.inputs)
        )
        if [entry[0] for entry in known] != [entry[0] for entry in inputs]:
            raise self._other_job("it had other inputs")
        changed = [number for number, entry in enumerate(known) if entry != inputs[number]]
        first_changed = min(changed, default=len(known))
        commits = [_commit_of(line) for line in lines]
        return [
            commit
            for commit in commits
            if commit.input_index < first_changed
            or (commit.input_index == first_changed and commit.offset == 0)
        ]

    def _other_job(self, difference: str) -> AscendSpeedError:
        return AscendSpeedError(
            f"{self.path} belongs to an interrupted run with other settings ({difference}); run its command again to "
            "resume it, or give --overwrite to discard it"
        )

    def start(self) -> None:
        """Start an empty journal."""
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
        """Return whether enough time has passed since the last commit."""
        return time.monotonic() - self._committed_at >= self._seconds / MAX_FLUSH_TIME_SHARE

    def commit(self, commit: Commit, flush: Any) -> None:
        """Call `flush` to flush the outputs, then append the commit."""
        started = time.monotonic()
        flush()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_line_of(commit)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._committed_at = time.monotonic()
        self._seconds = self._committed_at - started

    def remove(self) -> None:
        """Delete the journal."""
        self.path.unlink(missing_ok=True)


class _Head(BaseModel):
    """The first line."""

    format_version: Literal[2]
    job: dict[str, Any]
    inputs: Annotated[list[Annotated[list[Any], Field(min_length=1)]], Field(min_length=1)]


class _Line(BaseModel):
    """Another line, see `Commit`."""

    input_index: int = Field(ge=0)
    offset: int = Field(ge=0)
    outputs: dict[str, tuple[int, int, int]]
    counts: dict[str, dict[str, int | dict[str, int]]]
    renaming: bool


def _read(path: Path) -> tuple[_Head, list[_Line]]:
    """Return the lines of a journal, up to one that a crash cut short or that is damaged.

    Raises:
        DataError: the first line is damaged, or another version wrote it.
    """
    remedy = "give --overwrite to start again"
    first, *others = read_text(path, remedy=remedy).split("\n")
    head = parse_json(first, _Head, f"{path}, line 1", remedy)
    lines = []
    for number, line in enumerate(others[:-1], 2):
        try:
            lines.append(parse_json(line, _Line, f"{path}, line {number}"))
        except DataError as error:
            log(f"{error}: it goes on from the line before")
            break
    return head, lines


def _line_of(commit: Commit) -> dict[str, Any]:
    return {
        "input_index": commit.input_index,
        "offset": commit.offset,
        "outputs": {name: list(vars(state).values()) for name, state in commit.outputs.items()},
        "counts": commit.counts,
        "renaming": commit.renaming,
    }


def _commit_of(line: _Line) -> Commit:
    outputs = {name: WriterState(*numbers) for name, numbers in line.outputs.items()}
    return Commit(line.input_index, line.offset, outputs, line.counts, line.renaming)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
