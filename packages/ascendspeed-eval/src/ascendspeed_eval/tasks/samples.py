"""What a task is made of and makes: records, prompts, scored answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Record:
    """One record of a benchmark.

    Attributes:
        id: unique within the task.
        subset: its subject or sub-task.
        fields: its content.
        target: indices of the right choices, or the right text.
    """

    id: str
    subset: str
    fields: Mapping[str, Any]
    target: Any


@dataclass(frozen=True)
class Benchmark:
    """The records and examples read from a benchmark's files.

    Attributes:
        records: the questions.
        examples: few-shot examples, by subset.
        files: the files read; `run.json` records their hash.
    """

    records: Sequence[Record]
    examples: Mapping[str, Sequence[Record]]
    files: Sequence[Path]


ChatMessage = Mapping[str, str]
"""`role` and `content`."""


@dataclass(frozen=True)
class Sample:
    """One record with its prompt.

    Attributes:
        record: the record.
        prompt: full text.
        shared_characters: length of the prefix that all prompts of the subset share.
        num_examples: solved questions that the prompt shows.
        header: the prompt's text before the examples.
        examples: question and answer of each.
        question: the last part of the prompt.
        messages: what is sent instead of the prompt's text, in a chat; `prompt` is then what they are rendered to.
    """

    record: Record
    prompt: str
    shared_characters: int
    num_examples: int = 0
    header: str = ""
    examples: tuple[tuple[str, str], ...] = ()
    question: str = ""
    messages: tuple[ChatMessage, ...] = ()


@dataclass(frozen=True)
class ScoredSample:
    """One scored sample, a line of `samples.jsonl`.

    Attributes:
        id: of the record.
        subset: of the record.
        prompt: as sent to the model.
        target: of the record.
        scores: by name, 0 to 1.
        truncated_tokens: tokens of the prompt that did not fit.
        choices: the continuations compared.
        logprobs: of the choices.
        answer: index of the likeliest choice.
        outputs: generated texts.
        extracted: answers found in the first text; for HumanEval the result of each program.
        finish_reasons: why each text ended.
        marks: what is unusual in its texts, such as `length` or `only reasoning`; the report counts them.
        messages: the conversation, where the model was asked in a chat; `prompt` is what it was rendered to.
        removed: in a chat, the reasoning removed from the beginning of each text.
    """

    id: str
    subset: str
    prompt: str
    target: Any
    scores: Mapping[str, float]
    truncated_tokens: int
    choices: Sequence[str] = ()
    logprobs: Sequence[float] = ()
    answer: int | None = None
    outputs: Sequence[str] = ()
    extracted: Mapping[str, Any] = field(default_factory=dict)
    finish_reasons: Sequence[str] = ()
    marks: Sequence[str] = ()
    messages: Sequence[ChatMessage] = ()
    removed: Sequence[str] = ()

    @property
    def correct(self) -> bool:
        """Whether the first score is full."""
        return next(iter(self.scores.values()), 0.0) == 1.0


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of the user that change generated answers.

    Attributes:
        max_new_tokens: length limit of an answer; the variant's by default.
        num_samples: answers per record, for pass@k.
        temperature: of sampling; 0 is greedy decoding.
        seed: of sampling.
        allow_code_execution: the user allows running generated programs.
        allow_weak_sandbox: they may run with limits alone.
    """

    max_new_tokens: int | None = None
    num_samples: int = 1
    temperature: float = 0.0
    seed: int = 1234
    allow_code_execution: bool = False
    allow_weak_sandbox: bool = False
