"""What a task and a protocol are, and how samples become requests and answers become scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import UsageError
from ascendspeed_eval.model import EvaluatedModel, GenerateRequest, LoglikelihoodRequest
from ascendspeed_eval.tasks.template import fill


@dataclass(frozen=True)
class Record:
    """One record of a benchmark.

    Attributes:
        id: unique within the task.
        subset: subject or sub-task it belongs to.
        fields: as read.
        target: numbers of the right choices, or the right text.
    """

    id: str
    subset: str
    fields: Mapping[str, Any]
    target: Any


@dataclass(frozen=True)
class Benchmark:
    """What was read.

    Attributes:
        records: to be asked.
        examples: records that prompts may show, by subset.
        files: what was read, for the hash of the data.
    """

    records: Sequence[Record]
    examples: Mapping[str, Sequence[Record]]
    files: Sequence[Path]


Extracted = Mapping[str, Any]


def whole_text(text: str, record: Record) -> Extracted:
    """Take the answer as it is."""
    return {"strict": text, "flexible": text.strip()}


def without_first_space(text: str) -> str:
    """Drop the space that begins an answer, as the tokenizers of 2023 did when they decoded it."""
    return text.removeprefix(" ")


def own_target(record: Record) -> Sequence[int]:
    """Take the record's target as the numbers of its right choices."""
    numbers: Sequence[int] = record.target
    return numbers


def equals_target(answer: Any, record: Record) -> bool:
    """Compare with the target, character by character."""
    return bool(answer == record.target)


@dataclass(frozen=True)
class TaskVariant:
    """One way to ask and score.

    Attributes:
        name: as given to `--protocol`.
        summary: what it does, for the report.
        template: the question, with the record's fields in braces.
        choices: continuations whose likelihoods are compared; `None` when text is generated.
        targets: numbers of the right choices.
        header: what stands before the examples, with fields in braces.
        num_fewshot: examples in the prompt.
        separator: what stands between examples.
        last_separator: what stands between the examples and the question, where it differs.
        answer_prefix: what stands between an example's question and its answer.
        normalised: also report accuracy by likelihood per character of the choice.
        extract: finds answers in a generated text: one `strict`, one `flexible`.
        matches: whether an extracted answer is right.
        max_new_tokens: limit of generated text.
        stop: texts that end it.
        seq_length: longest prompt and answer in tokens, where the protocol says one.
        main: the score that counts of several.
    """

    name: str
    summary: str
    template: str
    choices: Callable[[Record], Sequence[str]] | None = None
    targets: Callable[[Record], Sequence[int]] = own_target
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
    """One record, ready to be asked.

    Attributes:
        record: the record.
        prompt: full text.
        shared_characters: beginning of the prompt that is the same for the whole subset.
    """

    record: Record
    prompt: str
    shared_characters: int


@dataclass(frozen=True)
class Scored:
    """One answered sample, a line of `samples.jsonl`.

    Attributes:
        id: of the record.
        subset: of the record.
        prompt: as asked.
        target: of the record.
        scores: by name, 0 to 1.
        truncated_tokens: tokens of the prompt that did not fit.
        choices: whose likelihoods were compared.
        logprobs: of the choices.
        answer: number of the likeliest choice.
        outputs: generated texts.
        extracted: answers found in the first of them; HumanEval: what became of each program.
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
class AskSettings:
    """Choices of the user that change answers.

    Attributes:
        max_new_tokens: limit of generated text instead of the protocol's.
        num_samples: texts per record.
        temperature: of the draws; 0 takes the likeliest token.
        seed: of the draws.
        run_code: the user consents to running generated programs.
    """

    max_new_tokens: int | None = None
    num_samples: int = 1
    temperature: float = 0.0
    seed: int = 1234
    run_code: bool = False


class Task(ABC):
    """A benchmark.

    Attributes:
        name: as given to `--task`.
        version: raised when a score would change.
        summary: one line.
        size: records of the whole benchmark.
        protocols: by name.
        default_protocol: the one used unless another is named.
        format: what files are read, for messages.
        groups: name of a group to its subsets, such as MMLU's categories.
        runs_code: whether scoring runs generated programs.
        reference_scores: published scores: model, protocol or source, score.
    """

    name: str
    version: int = 1
    summary: str = ""
    size: str = ""
    protocols: Mapping[str, TaskVariant]
    default_protocol: str = "ascendspeed"
    format: str
    groups: Mapping[str, Sequence[str]] = {}
    runs_code: bool = False
    reference_scores: Sequence[tuple[str, str, float]] = ()

    @abstractmethod
    def read(self, path: str) -> Benchmark:
        """Read what `--task-data-path` names.

        Raises:
            EvaluationError: something is missing or is not what it should be.
        """

    def header(self, protocol: TaskVariant, record: Record) -> str:
        """Return what stands before the examples."""
        return fill(protocol.header, record.fields)

    def question(self, protocol: TaskVariant, record: Record) -> str:
        """Return the question as asked."""
        return fill(protocol.template, record.fields)

    def answer(self, protocol: TaskVariant, record: Record) -> str:
        """Return the right answer, as an example shows it."""
        if protocol.choices is not None:
            return protocol.choices(record)[protocol.targets(record)[0]].removeprefix(protocol.answer_prefix)
        return str(record.target)

    def choose_examples(
        self, protocol: TaskVariant, benchmark: Benchmark, record: Record, count: int
    ) -> Sequence[Record]:
        """Return the first examples of the record's subset."""
        return benchmark.examples.get(record.subset, ())[:count]

    def samples(
        self, benchmark: Benchmark, protocol: TaskVariant, num_fewshot: int | None = None
    ) -> list[Sample]:
        """Make the prompts of all records.

        Raises:
            UsageError: there are fewer examples than asked for.
        """
        count = protocol.num_fewshot if num_fewshot is None else num_fewshot
        made = []
        for record in benchmark.records:
            examples = self.choose_examples(protocol, benchmark, record, count)
            if len(examples) < count:
                raise UsageError(
                    f"num_fewshot={count} is more than the {len(examples)} examples that {self.name}, subset "
                    f"{record.subset}, has; give --num-fewshot {len(examples)} or the files with examples"
                )
            shown = [
                self.question(protocol, example) + protocol.answer_prefix + self.answer(protocol, example)
                for example in examples
            ]
            last = protocol.separator if protocol.last_separator is None else protocol.last_separator
            head = self.header(protocol, record) + protocol.separator.join(shown) + (last if shown else "")
            shared = len(head) if self.shares_examples(protocol) else 0
            made.append(Sample(record, head + self.question(protocol, record), shared))
        return made

    def shares_examples(self, protocol: TaskVariant) -> bool:
        """Tell whether all records of a subset are shown the same examples."""
        return True

    def ask(
        self, model: EvaluatedModel, samples: Sequence[Sample], protocol: TaskVariant, settings: AskSettings
    ) -> list[Scored]:
        """Put samples to the model and score its answers."""
        if protocol.choices is not None:
            return _compare_choices(model, samples, protocol, protocol.choices)
        texts, truncated = generate_texts(model, samples, protocol, settings)
        return [
            self.score_texts(sample, own, cut, protocol, settings)
            for sample, own, cut in zip(samples, texts, truncated, strict=True)
        ]

    def score_texts(
        self,
        sample: Sample,
        texts: Sequence[str],
        truncated_tokens: int,
        protocol: TaskVariant,
        settings: AskSettings,
    ) -> Scored:
        """Score the texts generated for one sample; with several, a score is the share of right ones."""
        record = sample.record
        found = [dict(protocol.extract(text, record)) for text in texts]
        scores = {
            name: sum(protocol.matches(one[name], record) for one in found) / len(found) for name in found[0]
        }
        ordered = {name: scores[name] for name in sorted(scores, key=lambda name: name != protocol.main)}
        return Scored(
            record.id,
            record.subset,
            sample.prompt,
            record.target,
            ordered,
            truncated_tokens,
            outputs=list(texts),
            extracted=found[0],
        )

    def baselines(self, records: Sequence[Record], protocol: TaskVariant) -> dict[str, float]:
        """Return scores that need no model: guessing, and always giving the most frequent answer."""
        if protocol.choices is None or not records:
            return {}
        chance = sum(len(protocol.targets(r)) / len(protocol.choices(r)) for r in records) / len(records)
        numbers = {number for record in records for number in protocol.targets(record)}
        majority = max(sum(number in protocol.targets(r) for r in records) for number in numbers) / len(
            records
        )
        return {"chance": chance, "majority": majority}


def generate_texts(
    model: EvaluatedModel, samples: Sequence[Sample], protocol: TaskVariant, settings: AskSettings
) -> tuple[list[list[str]], list[int]]:
    """Generate `num_samples` texts per sample.

    Returns:
        The texts of each sample, and how many tokens of its prompt did not fit.
    """
    requests = [
        GenerateRequest(
            sample.prompt,
            settings.max_new_tokens or protocol.max_new_tokens,
            protocol.stop,
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
    protocol: TaskVariant,
    choices: Callable[[Record], Sequence[str]],
) -> list[Scored]:
    """Score every choice of every sample by log-likelihood; the likeliest is the answer, the first of equals."""
    requests = [
        LoglikelihoodRequest(sample.prompt, choice, sample.shared_characters)
        for sample in samples
        for choice in choices(sample.record)
    ]
    results = iter(model.loglikelihood(requests))
    scored = []
    for sample in samples:
        record, shown = sample.record, list(choices(sample.record))
        right = list(protocol.targets(record))
        own = [next(results) for _ in shown]
        logprobs = [result.logprob for result in own]
        answer = logprobs.index(max(logprobs))
        scores = {"accuracy": float(answer in right)}
        if protocol.normalised:
            lengths = [len(choice.removeprefix(protocol.answer_prefix)) for choice in shown]
            per_character = [value / length for value, length in zip(logprobs, lengths, strict=True)]
            best = per_character.index(max(per_character))
            scores["accuracy_normalised"] = float(best in right)
        scored.append(
            Scored(
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
