"""Tasks and their variants: how records become prompts, prompts become requests, and answers become scores."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import UsageError
from ascendspeed_eval.model import EvaluatedModel, GenerateRequest, LoglikelihoodRequest
from ascendspeed_eval.tasks.template import fill_template


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
    seq_length: int | None = None
    main: str = "accuracy"


@dataclass(frozen=True)
class Sample:
    """One record with its prompt.

    Attributes:
        record: the record.
        prompt: full text.
        shared_characters: length of the prefix that all prompts of the subset share.
        num_examples: solved questions that the prompt shows.
    """

    record: Record
    prompt: str
    shared_characters: int
    num_examples: int = 0


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
    """

    max_new_tokens: int | None = None
    num_samples: int = 1
    temperature: float = 0.0
    seed: int = 1234
    allow_code_execution: bool = False


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
        made = []
        for record in benchmark.records:
            examples = self.fewshot_examples(variant, benchmark, record, count)
            if len(examples) < count:
                raise UsageError(
                    f"num_fewshot={count} is more than the {len(examples)} examples that {self.name}, subset "
                    f"{record.subset}, has; give --num-fewshot {len(examples)} or the files with examples"
                )
            shown = [
                self.question(variant, example) + variant.answer_prefix + self.answer(variant, example)
                for example in examples
            ]
            last = variant.separator if variant.last_separator is None else variant.last_separator
            head = self.header(variant, record) + variant.separator.join(shown) + (last if shown else "")
            shared = len(head) if self.shares_examples(variant) else 0
            made.append(Sample(record, head + self.question(variant, record), shared, len(shown)))
        return made

    def shares_examples(self, variant: TaskVariant) -> bool:
        """Return whether all prompts of a subset show the same examples."""
        return True

    def evaluate_samples(
        self,
        model: EvaluatedModel,
        samples: Sequence[Sample],
        variant: TaskVariant,
        settings: GenerationSettings,
    ) -> list[ScoredSample]:
        """Run the model on samples and score its answers."""
        if variant.choices is not None:
            return _compare_choices(model, samples, variant, variant.choices)
        texts, truncated = generate_texts(model, samples, variant, settings)
        return [
            self.score_texts(sample, own, cut, variant, settings)
            for sample, own, cut in zip(samples, texts, truncated, strict=True)
        ]

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


def generate_texts(
    model: EvaluatedModel, samples: Sequence[Sample], variant: TaskVariant, settings: GenerationSettings
) -> tuple[list[list[str]], list[int]]:
    """Generate `num_samples` texts per sample.

    Returns:
        The texts of each sample, and the number of tokens dropped from its prompt.
    """
    requests = [
        GenerateRequest(
            sample.prompt,
            settings.max_new_tokens or variant.max_new_tokens,
            variant.stop,
            settings.temperature,
            settings.seed + number,
            sample.shared_characters,
        )
        for sample in samples
        for number in range(settings.num_samples)
    ]
    results = model.generate(requests)
    width = settings.num_samples
    own = [results[number * width : (number + 1) * width] for number in range(len(samples))]
    return [[r.text for r in part] for part in own], [max(r.truncated_tokens for r in part) for part in own]


def _compare_choices(
    model: EvaluatedModel,
    samples: Sequence[Sample],
    variant: TaskVariant,
    choices: Callable[[Record], Sequence[str]],
) -> list[ScoredSample]:
    """Score the choices of each sample by log-likelihood; the first of the likeliest is the answer."""
    requests = [
        LoglikelihoodRequest(sample.prompt, choice, sample.shared_characters)
        for sample in samples
        for choice in choices(sample.record)
    ]
    results = iter(model.loglikelihood(requests))
    scored = []
    for sample in samples:
        record, shown = sample.record, list(choices(sample.record))
        right = list(variant.targets(record))
        own = [next(results) for _ in shown]
        logprobs = [result.logprob for result in own]
        answer = logprobs.index(max(logprobs))
        scores = {"accuracy": float(answer in right)}
        if variant.normalised:
            lengths = [len(choice.removeprefix(variant.answer_prefix)) for choice in shown]
            per_character = [value / length for value, length in zip(logprobs, lengths, strict=True)]
            best = per_character.index(max(per_character))
            scores["accuracy_normalised"] = float(best in right)
        scored.append(
            ScoredSample(
                record.id,
                record.subset,
                sample.prompt,
                right,
                scores,
                max(result.truncated_tokens for result in own),
                choices=shown,
                logprobs=logprobs,
                answer=answer,
            )
        )
    return scored


def letters(count: int, prefix: str = " ") -> Callable[[Record], Sequence[str]]:
    """Return the choices A, B, C ... of every record."""
    shown = tuple(prefix + letter for letter in "ABCDEFGH"[:count])
    return lambda record: shown
