"""What an evaluation is: a task with its variant, records, prompts and settings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ascendspeed_eval.errors import UsageError, did_you_mean
from ascendspeed_eval.tasks.base import Task, TaskVariant
from ascendspeed_eval.tasks.samples import Benchmark, GenerationSettings, Record, Sample


@dataclass(frozen=True)
class Evaluation:
    """A task with its variant, data, prompts and settings: everything but the model.

    Attributes:
        task: the benchmark.
        variant: how the task is prompted and scored.
        benchmark: the records read from its files.
        samples: the prompts.
        generation: settings that change generated answers.
        settings: all settings that `run.json` records.
    """

    task: Task
    variant: TaskVariant
    benchmark: Benchmark
    samples: Sequence[Sample]
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    settings: Mapping[str, Any] = field(default_factory=dict)


def prepare_evaluation(
    task: Task,
    variant: TaskVariant,
    path: str,
    *,
    subsets: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    generation: GenerationSettings | None = None,
    seed: int = 1234,
) -> Evaluation:
    """Read the benchmark and build the prompts.

    Args:
        task: the benchmark.
        variant: how the task is prompted and scored.
        path: a file or folder that the task reads.
        subsets: keep these subsets only; the name of a group stands for its subsets.
        limit: keep the first `limit` samples of each subset.
        num_fewshot: number of examples in the prompt; the variant's number by default.
        generation: settings that change generated answers.
        seed: recorded in `run.json`.

    Raises:
        UsageError: an unknown subset, or fewer examples than `num_fewshot`.
        EvaluationError: a file is missing or damaged.
    """
    generation = generation or GenerationSettings(seed=seed)
    benchmark = task.read(path)
    records = _choose_subsets(task, benchmark.records, subsets)
    if limit is not None:
        records = _first_of_each_subset(records, limit)
    benchmark = Benchmark(records, benchmark.examples, benchmark.files)
    samples = task.samples(benchmark, variant, num_fewshot)
    settings = {
        "limit": limit,
        "subsets": list(subsets),
        "num_fewshot": variant.num_fewshot if num_fewshot is None else num_fewshot,
        "max_new_tokens": generation.max_new_tokens or variant.max_new_tokens,
        "num_samples": generation.num_samples,
        "temperature": generation.temperature,
        "seed": seed,
    }
    return Evaluation(task, variant, benchmark, samples, generation, settings)


def _choose_subsets(task: Task, records: Sequence[Record], names: Sequence[str]) -> list[Record]:
    """Return the records of the named subsets, or all of them if none is named."""
    known = list(dict.fromkeys(record.subset for record in records))
    wanted = [subset for name in names for subset in task.groups.get(name, (name,))]
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"subset={name} does not exist; choose from {', '.join(known)}{did_you_mean(name, known)}"
            )
    return [record for record in records if not wanted or record.subset in wanted]


def _first_of_each_subset(records: Sequence[Record], limit: int) -> list[Record]:
    counts: Counter[str] = Counter()
    kept = []
    for record in records:
        counts[record.subset] += 1
        if counts[record.subset] <= limit:
            kept.append(record)
    return kept
