"""A backend that reads its answers from a file: for trying tasks and for tests."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import EvaluationError, UsageError
from ascendspeed_eval.model import (
    BackendOption,
    EvaluatedModel,
    GenerateRequest,
    GenerateResult,
    LoglikelihoodRequest,
    LoglikelihoodResult,
    ModelDescription,
)
from ascendspeed_eval.small_files import check_keys, parse_json, read_text

Answer = dict[str, Any]


class ScriptedModel:
    """Answers from JSON lines.

    A line is `{"contains": TEXT, "logprobs": {CONTINUATION: NUMBER, ...}, "text": TEXT}`; the first whose `contains`
    occurs in a prompt answers it. A continuation that is not listed gets -100.
    """

    def __init__(self, answers: Sequence[Answer], name: str) -> None:
        self._answers, self._name = answers, name

    def describe(self) -> ModelDescription:
        """Name the file."""
        return ModelDescription(name=self._name, details={"backend": "scripted"})

    def loglikelihood(self, requests: Sequence[LoglikelihoodRequest]) -> list[LoglikelihoodResult]:
        """Look up the continuations."""
        results = []
        for request in requests:
            logprobs = self._find(request.context).get("logprobs", {})
            value = float(logprobs.get(request.continuation, -100.0))
            results.append(LoglikelihoodResult(value, value == max(logprobs.values(), default=None), 0))
        return results

    def start_chat(self, template_values: Mapping[str, Any], day: str | None) -> None:
        """Get ready to answer conversations, which it renders without a template.

        Raises:
            UsageError: values for a template are given.
        """
        if template_values or day is not None:
            raise UsageError(
                "scripted_answers has no chat template; leave --chat-template-kwargs and --chat-template-date out"
            )

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Sequence[Mapping[str, str]]]:
        """Return each message after its role in brackets."""
        shown = [f"[{one['role']}]\n{one['content']}\n" for one in messages]
        return "".join(shown) + "[assistant]\n", messages

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        """Look up the texts."""
        return [
            GenerateResult(str(self._find(request.prompt).get("text", "")), "stop") for request in requests
        ]

    def _find(self, prompt: str) -> Answer:
        for answer in self._answers:
            if answer.get("contains", "") in prompt:
                return answer
        raise EvaluationError(
            f"{self._name} has no answer for the prompt that ends in {prompt[-60:]!r}; add a line"
        )


class ScriptedBackend:
    """The entry point `scripted`."""

    name = "scripted"
    summary = "answers from a file"
    options: Sequence[BackendOption] = (
        BackendOption("scripted_answers", str, "JSON lines with the answers of a scripted model, for tests."),
    )

    def claims(self, options: Mapping[str, Any]) -> bool:
        """Return whether a file is given."""
        return "scripted_answers" in options

    def launch(self, options: Mapping[str, Any], arguments: Sequence[str]) -> bool:
        """One process is enough."""
        return False

    @contextmanager
    def open(self, options: Mapping[str, Any]) -> Iterator[EvaluatedModel | None]:
        """Read the file."""
        path = Path(options["scripted_answers"])
        text = read_text(path, f"scripted_answers={path}", "--scripted-answers")
        # Not splitlines(), which also splits at characters that JSON allows inside a string.
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        yield ScriptedModel([_answer(line, f"{path}, line {number}") for number, line in lines], path.name)


def _answer(line: str, where: str) -> Answer:
    answer: Answer = {"contains": "", "logprobs": {}, "text": ""}
    given = parse_json(line, where)
    check_keys(given, {}, where)
    answer |= given
    check_keys(answer, {"contains": str, "logprobs": dict, "text": str}, where)
    check_keys(answer["logprobs"], dict.fromkeys(answer["logprobs"], (int, float)), f"{where}: logprobs")
    return answer


backend = ScriptedBackend()
