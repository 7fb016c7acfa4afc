"""What an evaluation is: a task with its variant, records, prompts and settings."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ascendspeed_eval.conversations import ChatSettings
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
        chat: how prompts become conversations; `None` where they are texts.
        data_origin: `org/name@commit` of data from a hub.
        recipe: that the settings began with.
    """

    task: Task
    variant: TaskVariant
    benchmark: Benchmark
    samples: Sequence[Sample]
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    settings: Mapping[str, Any] = field(default_factory=dict)
    chat: ChatSettings | None = None
    data_origin: str | None = None
    recipe: str | None = None


def prepare_evaluation(
    task: Task,
    variant: TaskVariant,
    path: str,
    *,
    subsets: Sequence[str] = (),
    limit: int | None = None,
    limit_seed: int | None = None,
    num_fewshot: int | None = None,
    generation: GenerationSettings | None = None,
    seed: int = 1234,
    chat: ChatSettings | None = None,
) -> Evaluation:
    """Read the benchmark and build the prompts.

    Args:
        task: the benchmark.
        variant: how the task is prompted and scored.
        path: a file or folder that the task reads.
        subsets: keep these subsets only; the name of a group stands for its subsets.
        limit: keep the first `limit` samples of each subset.
        limit_seed: draw those samples at random with this seed instead; they stay in their order.
        num_fewshot: number of examples in the prompt; the variant's number by default.
        generation: settings that change generated answers.
        seed: recorded in `run.json`.
        chat: ask in conversations, by the model's chat template.

    Raises:
        UsageError: an unknown subset, a `limit_seed` without `limit`, or fewer examples than `num_fewshot`.
        EvaluationError: a file is missing or damaged.
    """
    generation = generation or GenerationSettings(seed=seed)
    benchmark = task.read(path)
    records = _choose_subsets(task, variant, benchmark.records, subsets)
    if limit is not None:
        records = _some_of_each_subset(records, limit, limit_seed)
    elif limit_seed is not None:
        raise UsageError(
            f"limit_seed={limit_seed} means nothing without --limit; give it too, or leave it out"
        )
    benchmark = Benchmark(records, benchmark.examples, benchmark.files)
    samples = task.samples(benchmark, variant, num_fewshot)
    settings: dict[str, Any] = {
        "limit": limit,
        "limit_seed": limit_seed,
        "subsets": list(subsets),
        "num_fewshot": variant.num_fewshot if num_fewshot is None else num_fewshot,
        "max_new_tokens": generation.max_new_tokens or variant.max_new_tokens,
        "num_samples": generation.num_samples,
        "temperature": generation.temperature,
        "seed": seed,
    }
    if chat is not None:
        settings["chat"] = chat.as_settings()
    return Evaluation(task, variant, benchmark, samples, generation, settings, chat)


def _choose_subsets(
    task: Task, variant: TaskVariant, records: Sequence[Record], names: Sequence[str]
) -> list[Record]:
    """Return the records of the named subsets, or all of them if none is named."""
    known = list(dict.fromkeys(record.subset for record in records))
    _, groups = task.groups_of(variant)
    wanted = []
    for name in names:
        # The data may hold some subsets of a group only.
        members = [subset for subset in groups.get(name, (name,)) if subset in known]
        if not members:
            raise UsageError(
                f"subset={name} does not exist; choose from {', '.join(known)}{did_you_mean(name, known)}"
            )
        wanted += members
    return [record for record in records if not wanted or record.subset in wanted]


def _some_of_each_subset(records: Sequence[Record], limit: int, seed: int | None) -> list[Record]:
    """Return the first samples of each subset, or some that are drawn, in the order of the files."""
    by_subset: dict[str, list[int]] = {}
    for number, record in enumerate(records):
        by_subset.setdefault(record.subset, []).append(number)
    kept: set[int] = set()
    for subset, numbers in by_subset.items():
        # Each subset has draws of its own, so that choosing subsets does not change them.
        drawn = numbers if seed is None else random.Random(f"{seed}/{subset}").sample(numbers, len(numbers))
        kept.update(drawn[:limit])
    return [record for number, record in enumerate(records) if number in kept]
