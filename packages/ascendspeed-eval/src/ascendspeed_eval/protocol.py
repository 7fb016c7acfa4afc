"""What a report says of how a task was asked and scored, made from what really ran."""

from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed_eval.tasks.base import Task, TaskVariant
from ascendspeed_eval.tasks.samples import Sample


def describe_protocol(
    task: Task,
    variant: TaskVariant,
    samples: Sequence[Sample] = (),
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Return the sentence of a report about examples, prompt, generated text and rule, without a full stop.

    Args:
        task: the benchmark.
        variant: how it was prompted and scored.
        samples: the prompts; without them, what the protocol says by itself.
        settings: those of the run, as `prepare_evaluation` records them.
    """
    given = settings or {}
    counts = [sample.num_examples for sample in samples] or [variant.num_fewshot]
    parts = [_shots(min(counts), max(counts))]
    if given.get("num_fewshot", variant.num_fewshot) != variant.num_fewshot:
        parts[0] += f" (the protocol's own number of examples is {variant.num_fewshot})"
    own = task.variants.get(variant.name, variant)
    if variant.template != own.template:
        parts.append("with a question template of your own (--prompt-template) in place of the protocol's")
    if variant.max_new_tokens:
        parts.append(_generated(variant, given))
    if chat := given.get("chat"):
        parts.append(_asked_in_chat(chat, bool(variant.max_new_tokens)))
    parts.append(variant.summary)
    return "; ".join(parts) + _chosen(given)


def _asked_in_chat(chat: Mapping[str, Any], generates: bool) -> str:
    """Say how prompts became conversations, and what happened to answers."""
    text = "asked in conversations by the model's chat template"
    text += f" with the system message {chat['system']!r}" if chat["system"] else ""
    text += (
        ", each example as a turn" if chat["fewshot_as_multiturn"] else ", with the examples in one message"
    )
    return text + (", reasoning up to the last </think> removed" if generates else "")


def _shots(least: int, most: int) -> str:
    if least != most:
        return f"{least or 'zero'}- to {most}-shot"
    return f"{most}-shot" if most else "zero-shot"


def _generated(variant: TaskVariant, given: Mapping[str, Any]) -> str:
    """Say how text was generated; a variant with choices generates only where a question has none."""
    temperature, answers = given.get("temperature", 0.0), given.get("num_samples", 1)
    text = "greedy text" if not temperature else f"text drawn at temperature {temperature:g}"
    if answers > 1:
        text += f", {answers} answers for each question"
    length = given.get("max_new_tokens", variant.max_new_tokens)
    if length != variant.max_new_tokens:
        text += f", at most {length} tokens (the protocol's own limit is {variant.max_new_tokens})"
    return text if variant.choices is None else f"{text} where a question has no options"


def _chosen(given: Mapping[str, Any]) -> str:
    """Say which questions were asked, if not all."""
    limit, seed = given.get("limit"), given.get("limit_seed")
    if limit is None:
        return ""
    which = f"the first {limit}" if seed is None else f"{limit} drawn with --limit-seed {seed}"
    return f"; of each subset only {which}"
