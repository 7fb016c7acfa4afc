"""Tasks and their variants: how records become prompts, prompts become requests, and answers become scores."""

import random
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ascendspeed_eval.errors import UsageError
from ascendspeed_eval.model import (
    GenerateRequest,
    GenerateResult,
    LoglikelihoodRequest,
    LoglikelihoodResult,
    Request,
)
from ascendspeed_eval.tasks.answer_marks import marks_of
from ascendspeed_eval.tasks.chat_answers import opens_reasoning, split_answer
from ascendspeed_eval.tasks.samples import Benchmark, GenerationSettings, Record, Sample, ScoredSample
from ascendspeed_eval.tasks.template import fill_template

EXAMPLES_SEED = 1234
"""lm-evaluation-harness draws the examples of all questions from one generator with this seed."""

Extracted = Mapping[str, Any]


def whole_text(text: str, record: Record) -> Extracted:
    """Return the whole text as the answer."""
    return {"strict": text, "flexible": text.strip()}


def without_first_space(text: str) -> str:
    """Drop one space at the start, as the tokenizers of 2023 did when decoding."""
    return text.removeprefix(" ")


def target_choices(record: Record) -> Sequence[int]:
    """Return the record's target, which holds the indices of its right choices."""
    numbers: Sequence[int] = record.target
    return numbers


def equals_target(answer: Any, record: Record) -> bool:
    """Compare with the target, character by character."""
    return bool(answer == record.target)


@dataclass(frozen=True)
class TaskVariant:
    """One way to prompt and score a task; users choose it with `--protocol`.

    Attributes:
        name: as given to `--protocol`.
        summary: how it asks and scores, for the report; without number of examples and sampling, which are settings.
        template: the question, with the record's fields in braces.
        choices: continuations to compare by likelihood; `None` if the model generates text.
        targets: indices of the right choices.
        header: text before the examples, with fields in braces.
        num_fewshot: examples in the prompt.
        separator: text between examples.
        last_separator: text between the last example and the question, if it differs.
        answer_prefix: text between question and answer.
        normalised: also report accuracy by log-likelihood per character of the choice.
        extract: finds the answers in a generated text: one `strict`, one `flexible`.
        matches: returns whether an extracted answer is right.
        max_new_tokens: length limit of generated text.
        stop: strings that end generated text.
        surplus_draws: each question has examples of its own, drawn as lm-evaluation-harness draws them, together with
            this number of others that are not shown; `None` where all questions show the same examples.
        seq_length: tokens of prompt and answer together, if the variant limits them.
        main: the metric reported as the score.
    """

    name: str
    summary: str
    template: str
    choices: Callable[[Record], Sequence[str]] | None = None
    targets: Callable[[Record], Sequence[int]] = target_choices
    header: str = ""
    num_fewshot: int = 0
    separator: str = "\n\n"
    last_separator: str | None = None
    answer_prefix: str = " "
    normalised: bool = False
    extract: Callable[[str, Record], Extracted] = whole_text
    matches: Callable[[Any, Record], bool] = equals_target
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    surplus_draws: int | None = None
    seq_length: int | None = None
    main: str = "accuracy"

    def __post_init__(self) -> None:
        if not all(isinstance(one, str) and one for one in self.stop):
            raise UsageError(
                f"variant {self.name}: stop={self.stop!r} holds an empty text or no text; correct it"
            )


class Task(ABC):
    """A benchmark.

    Attributes:
        name: as given to `--task`.
        version: raised whenever scores would change.
        summary: one line.
        size: number of records in the whole benchmark.
        variants: by name.
        default_variant: name of the variant used unless `--protocol` names another.
        format: the files that the task reads, for messages.
        groups: subsets of each group, such as MMLU's categories.
        groups_source: whose groups these are, for the report.
        runs_code: whether scoring runs generated programs.
        reference_scores: published scores: model, source, score.
    """

    name: str
    version: int = 1
    summary: str = ""
    size: str = ""
    variants: Mapping[str, TaskVariant]
    default_variant: str = "ascendspeed"
    format: str
    groups: Mapping[str, Sequence[str]] = {}
    groups_source: str = ""
    runs_code: bool = False
    reference_scores: Sequence[tuple[str, str, float]] = ()

    @abstractmethod
    def read(self, path: str) -> Benchmark:
        """Read the benchmark from `--task-data-path`.

        Raises:
            EvaluationError: a file is missing or not valid.
        """

    def prepare(self, settings: GenerationSettings) -> None:  # noqa: B027 - most tasks need nothing
        """Get ready to score, before the model is asked anything.

        Raises:
            EvaluationError: the task cannot be scored with these settings, or on this machine.
        """

    def groups_of(self, variant: TaskVariant) -> tuple[str, Mapping[str, Sequence[str]]]:
        """Return whose groups a report of this variant shows, and the subsets of each."""
        return self.groups_source or f"the task {self.name}", self.groups

    def header(self, variant: TaskVariant, record: Record) -> str:
        """Return the text before the examples."""
        return fill_template(variant.header, record.fields)

    def question(self, variant: TaskVariant, record: Record) -> str:
        """Return the question as the prompt shows it."""
        return fill_template(variant.template, record.fields)

    def answer(self, variant: TaskVariant, record: Record) -> str:
        """Return the right answer, as examples show it."""
        if variant.choices is not None:
            return variant.choices(record)[variant.targets(record)[0]].removeprefix(variant.answer_prefix)
        return str(record.target)

    def fewshot_examples(
        self, variant: TaskVariant, benchmark: Benchmark, record: Record, count: int
    ) -> Sequence[Record]:
        """Return the first examples of the record's subset."""
        return benchmark.examples.get(record.subset, ())[:count]

    def samples(
        self, benchmark: Benchmark, variant: TaskVariant, num_fewshot: int | None = None
    ) -> list[Sample]:
        """Build the prompts of all records.

        Raises:
            UsageError: a subset has fewer than `num_fewshot` examples.
        """
        count = variant.num_fewshot if num_fewshot is None else num_fewshot
        draw, made = random.Random(EXAMPLES_SEED), []
        for record in benchmark.records:
            if variant.surplus_draws is not None and count:
                pool = self.fewshot_examples(variant, benchmark, record, sys.maxsize)
                drawn = min(count + variant.surplus_draws, len(pool))
                examples: Sequence[Record] = draw.sample(list(pool), drawn)[:count]
            else:
                examples = self.fewshot_examples(variant, benchmark, record, count)
            if len(examples) < count:
                raise UsageError(
                    f"num_fewshot={count} is more than the {len(examples)} examples that {self.name}, subset "
                    f"{record.subset}, has; give --num-fewshot {len(examples)} or the files with examples"
                )
            turns = tuple((self.question(variant, one), self.answer(variant, one)) for one in examples)
            shown = [question + variant.answer_prefix + answer for question, answer in turns]
            last = variant.separator if variant.last_separator is None else variant.last_separator
            head = self.header(variant, record) + variant.separator.join(shown) + (last if shown else "")
            shared = len(head) if self.shares_examples(variant) and variant.surplus_draws is None else 0
            question = self.question(variant, record)
            made.append(
                Sample(
                    record,
                    head + question,
                    shared,
                    len(examples),
                    self.header(variant, record),
                    turns,
                    question,
                )
            )
        return made

    def shares_examples(self, variant: TaskVariant) -> bool:
        """Return whether all prompts of a subset show the same examples."""
        return True

    def requests(
        self, sample: Sample, variant: TaskVariant, settings: GenerationSettings
    ) -> Sequence[Request]:
        """Return what the model is asked for a sample: its choices, or `num_samples` texts.

        In a chat no stop string ends a text, as it could stand in what the model thinks; see `split_answer`.
        """
        if variant.choices is not None:
            return [
                LoglikelihoodRequest(sample.prompt, choice, sample.shared_characters, sample.messages)
                for choice in _shown_choices(sample, variant)
            ]
        return [
            GenerateRequest(
                sample.prompt,
                settings.max_new_tokens or variant.max_new_tokens,
                () if sample.messages else variant.stop,
                settings.temperature,
                settings.seed + number,
                sample.shared_characters,
                sample.messages,
            )
            for number in range(settings.num_samples)
        ]

    def score(
        self,
        sample: Sample,
        results: Sequence[LoglikelihoodResult | GenerateResult],
        variant: TaskVariant,
        settings: GenerationSettings,
    ) -> ScoredSample:
        """Score what the model answered to the `requests` of a sample."""
        if variant.choices is not None:
            own = [one for one in results if isinstance(one, LoglikelihoodResult)]
            return _compare_choices(sample, own, variant, _shown_choices(sample, variant))
        texts = [one for one in results if isinstance(one, GenerateResult)]
        truncated = max(one.truncated_tokens for one in texts)
        is_open = bool(sample.messages) and opens_reasoning(sample.prompt)
        answers, removed = texts, list[str]()
        if sample.messages:
            split = [split_answer(one, variant.stop, is_open) for one in texts]
            answers = [answer for answer, _ in split]
            # Some servers keep the reasoning apart from the text themselves.
            removed = [one.reasoning + thought for one, (_, thought) in zip(texts, split, strict=True)]
        scored = self.score_texts(sample, [one.text for one in answers], truncated, variant, settings)
        ended = [
            replace(one, finish_reason=answer.finish_reason)
            for one, answer in zip(texts, answers, strict=True)
        ]
        return replace(
            scored,
            finish_reasons=[one.finish_reason for one in ended],
            marks=list(dict.fromkeys([*marks_of(ended, is_open), *scored.marks])),
            messages=list(sample.messages),
            removed=removed,
        )

    def score_texts(
        self,
        sample: Sample,
        texts: Sequence[str],
        truncated_tokens: int,
        variant: TaskVariant,
        settings: GenerationSettings,
    ) -> ScoredSample:
        """Score the texts of one sample; with several texts, a score is the share of right answers."""
        record = sample.record
        found = [dict(variant.extract(text, record)) for text in texts]
        scores = {
            name: sum(variant.matches(one[name], record) for one in found) / len(found) for name in found[0]
        }
        ordered = {name: scores[name] for name in sorted(scores, key=lambda name: name != variant.main)}
        return ScoredSample(
            record.id,
            record.subset,
            sample.prompt,
            record.target,
            ordered,
            truncated_tokens,
            outputs=list(texts),
            extracted=found[0],
        )

    def baselines(self, records: Sequence[Record], variant: TaskVariant) -> dict[str, float]:
        """Return the scores of guessing, where there are choices, and of always giving the most frequent answer."""
        if not records or self.runs_code:
            return {}
        if variant.choices is None:
            targets = Counter(str(record.target) for record in records)
            return {"majority": max(targets.values()) / len(records)}
        chance = sum(len(variant.targets(r)) / len(variant.choices(r)) for r in records) / len(records)
        numbers = {number for record in records for number in variant.targets(record)}
        majority = max(sum(number in variant.targets(r) for r in records) for number in numbers) / len(
            records
        )
        return {"chance": chance, "majority": majority}


def _shown_choices(sample: Sample, variant: TaskVariant) -> Sequence[str]:
    """Return the choices; in a chat without the text between question and answer, as an answer begins a turn."""
    assert variant.choices is not None
    choices = variant.choices(sample.record)
    return [one.removeprefix(variant.answer_prefix) for one in choices] if sample.messages else choices


def _compare_choices(
    sample: Sample, results: Sequence[LoglikelihoodResult], variant: TaskVariant, shown: Sequence[str]
) -> ScoredSample:
    """Score the choices of a sample by log-likelihood; the first of the likeliest is the answer."""
    record, right = sample.record, list(variant.targets(sample.record))
    logprobs = [result.logprob for result in results]
    answer = logprobs.index(max(logprobs))
    scores = {"accuracy": float(answer in right)}
    if variant.normalised:
        lengths = [len(choice.removeprefix(variant.answer_prefix)) for choice in shown]
        per_character = [value / length for value, length in zip(logprobs, lengths, strict=True)]
        best = per_character.index(max(per_character))
        scores["accuracy_normalised"] = float(best in right)
    return ScoredSample(
        record.id,
        record.subset,
        sample.prompt,
        right,
        scores,
        max(result.truncated_tokens for result in results),
        choices=list(shown),
        logprobs=logprobs,
        answer=answer,
        messages=list(sample.messages),
    )


def letters(count: int, prefix: str = " ") -> Callable[[Record], Sequence[str]]:
    """Return the choices A, B, C ... of every record."""
    shown = tuple(prefix + letter for letter in "ABCDEFGH"[:count])
    return lambda record: shown
