"""What a task is."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ascendspeed_eval.model import EvaluatedModel


@dataclass(frozen=True)
class Protocol_:  # noqa: N801 - `Protocol` is typing's
    """One way to ask and score.

    Attributes:
        name: as given to `--protocol`.
        summary: what it does, for the report.
        template: prompt with the record's fields in braces.
        choices: continuations that are scored, in the order of preference when two are equally likely.
    """

    name: str
    summary: str
    template: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One record, ready to be asked.

    Attributes:
        id: unique within the task.
        prompt: full text.
        target: number of the right choice.
    """

    id: str
    prompt: str
    target: int


@dataclass(frozen=True)
class Scored:
    """One answered sample, a line of `samples.jsonl`."""

    id: str
    prompt: str
    choices: Sequence[str]
    logprobs: Sequence[float]
    answer: int
    target: int
    correct: bool
    truncated_tokens: int


class Task(Protocol):
    """A benchmark.

    Attributes:
        name: as given to `--task`.
        version: raised when a score would change.
        metric: of `score`.
        protocols: by name.
        default_protocol: the one used unless another is named.
        format: what files are read, for messages.
    """

    name: str
    version: int
    metric: str
    protocols: Mapping[str, Protocol_]
    default_protocol: str
    format: str

    def find_files(self, path: str) -> list[Path]:
        """Return the files that `--task-data-path` names."""
        ...

    def load(self, files: Sequence[Path], protocol: Protocol_) -> list[Sample]:
        """Read all samples, in the order of the files."""
        ...

    def ask(self, model: EvaluatedModel, samples: Sequence[Sample], protocol: Protocol_) -> list[Scored]:
        """Put samples to the model and score its answers."""
        ...

    def baselines(self, scored: Sequence[Scored]) -> dict[str, float]:
        """Return scores that need no model: `chance`, `majority`."""
        ...


def answer_choice(model: EvaluatedModel, samples: Sequence[Sample], protocol: Protocol_) -> list[Scored]:
    """Score every choice of every sample by log-likelihood; the likeliest is the answer, the first of equals."""
    from ascendspeed_eval.model import LoglikelihoodRequest

    requests = [LoglikelihoodRequest(s.prompt, choice) for s in samples for choice in protocol.choices]
    results = model.loglikelihood(requests)
    scored = []
    for number, sample in enumerate(samples):
        width = len(protocol.choices)
        own = results[number * width : (number + 1) * width]
        logprobs = [result.logprob for result in own]
        answer = logprobs.index(max(logprobs))
        truncated = max(result.truncated_tokens for result in own)
        scored.append(
            Scored(
                sample.id,
                sample.prompt,
                protocol.choices,
                logprobs,
                answer,
                sample.target,
                answer == sample.target,
                truncated,
            )
        )
    return scored


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """Put fields into a template; braces of unknown names, and those within fields, are left as they are."""
    return re.sub(r"\{(\w+)\}", lambda m: str(fields[m[1]]) if m[1] in fields else m[0], template)
