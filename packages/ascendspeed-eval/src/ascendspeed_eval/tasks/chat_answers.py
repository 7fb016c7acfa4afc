"""Answers of a conversation: what a model thought is removed before an answer is looked for."""

import re
from dataclasses import replace

from ascendspeed_eval.model import GenerateResult
from ascendspeed_eval.tasks.answer_marks import OPENED, without_reasoning


def opens_reasoning(prompt: str) -> bool:
    """Return whether a prompt ends with the mark that begins reasoning, as some templates write it."""
    return OPENED.search(prompt) is not None


def split_answer(given: GenerateResult, stop: tuple[str, ...], is_open: bool) -> tuple[GenerateResult, str]:
    """Return an answer without its reasoning and up to the first stop string, and what was removed before it.

    The rule: what stands up to the last `</think>` (`</thinking>`, `</reasoning>`) is removed, with the white space
    after it. Where reasoning was begun, by the prompt or by the text, and never ends, everything is removed. Stop
    strings count in what is left only. lm-evaluation-harness does the same with `think_end_token=</think>`, but takes
    reasoning that never ends for the answer.

    Args:
        given: what the model wrote.
        stop: strings that end an answer.
        is_open: whether the prompt began the reasoning.
    """
    text = without_reasoning(given.text, is_open)
    if text != given.text:
        text = text.lstrip()
    removed = given.text[: len(given.text) - len(text)]
    reason = given.finish_reason
    found = re.search("|".join(map(re.escape, stop)), text) if stop else None
    if found is not None:
        text, reason = text[: found.start()], "stop"
    return replace(given, text=text, finish_reason=reason), removed
