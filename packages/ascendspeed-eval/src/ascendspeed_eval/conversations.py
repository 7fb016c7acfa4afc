"""Benchmarks asked as conversations: the prompts of samples as messages of a chat, for models that were tuned to it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any

from ascendspeed_eval.errors import EvaluationError, UsageError
from ascendspeed_eval.model import ChatModel, EvaluatedModel
from ascendspeed_eval.small_files import parse_json
from ascendspeed_eval.tasks.samples import ChatMessage, Sample

TODAY = "today"
DELIMITER = "\n\n"
"""What lm-evaluation-harness puts between a system message of the user and a task's own, by default."""


@dataclass(frozen=True)
class ChatSettings:
    """How prompts become conversations.

    Attributes:
        system: system message; the task's own header follows it.
        fewshot_as_multiturn: each example is a question of the user and an answer of the assistant; otherwise all stand
            in the one message of the user.
        template_values: variables that the chat template gets.
        day: `YYYY-MM-DD` for templates that show the date.
    """

    system: str | None = None
    fewshot_as_multiturn: bool = True
    template_values: Mapping[str, Any] = field(default_factory=dict)
    day: str | None = None

    @classmethod
    def of_flags(
        cls,
        apply_chat_template: bool,
        system: str | None,
        kwargs: str | None,
        day: str | None,
        fewshot_as_multiturn: bool | None,
    ) -> "ChatSettings | None":
        """Return the settings of the command's flags; `None` where prompts are texts.

        Raises:
            UsageError: a value cannot be read, or a flag means nothing without `--apply-chat-template`.
        """
        if not apply_chat_template:
            given = {
                "system": system,
                "chat_template_kwargs": kwargs,
                "chat_template_date": day,
                "fewshot_as_multiturn": fewshot_as_multiturn,
            }
            for name, value in given.items():
                if value is not None:
                    raise UsageError(
                        f"{name}={value} means nothing without --apply-chat-template; give it too, or leave it out"
                    )
            return None
        return cls(system or None, fewshot_as_multiturn is not False, _object(kwargs), _day(day))

    def as_settings(self) -> dict[str, Any]:
        """Return what `run.json` records."""
        shown = {
            "apply_chat_template": True,
            "system": self.system,
            "fewshot_as_multiturn": self.fewshot_as_multiturn,
            "chat_template_kwargs": dict(self.template_values),
        }
        return shown | ({"chat_template_date": self.day} if self.day is not None else {})

    def messages(self, sample: Sample) -> tuple[ChatMessage, ...]:
        """Return the conversation of a sample, as lm-evaluation-harness makes it of the same parts.

        The header of the task becomes the system message, after the user's own; line breaks between the two are added
        where neither has any.
        """
        own, header = self.system or "", sample.header
        joined = own and header and not own[-1].isspace() and not header[0].isspace()
        system = own + (DELIMITER if joined else "") + header
        made = [{"role": "system", "content": system}] if system else []
        if not self.fewshot_as_multiturn:
            return (*made, {"role": "user", "content": sample.prompt[len(header) :]})
        for question, answer in sample.examples:
            made += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return (*made, {"role": "user", "content": sample.question})


def conversations(settings: ChatSettings, samples: Sequence[Sample], model: EvaluatedModel) -> list[Sample]:
    """Return samples whose messages are sent, and whose prompt is what the model's template makes of them.

    A template without a place for a system message gets none, as in lm-evaluation-harness; samples show what was sent.

    Raises:
        EvaluationError: the backend renders no conversations, or refuses one.
    """
    if not isinstance(model, ChatModel):
        raise EvaluationError(
            "this backend renders no conversations, which --apply-chat-template asks for; leave it out, or choose "
            "--load, --transformers-model or --base-url with --api chat"
        )
    model.start_chat(settings.template_values, settings.day)
    made = []
    for sample in samples:
        text, messages = model.render_chat(settings.messages(sample))
        made.append(replace(sample, prompt=text, messages=tuple(messages), shared_characters=0))
    return made


def _object(text: str | None) -> dict[str, Any]:
    try:
        found = parse_json(text or "{}", "chat_template_kwargs")
    except EvaluationError as error:
        raise UsageError(str(error).replace("correct the file", "correct it")) from None
    if not isinstance(found, dict):
        raise UsageError(
            f"chat_template_kwargs={text} is no JSON object; give one such as "
            + json.dumps({"enable_thinking": False})
        )
    return found


def _day(given: str | None) -> str | None:
    if given is None:
        return None
    try:
        return (date.today() if given == TODAY else date.fromisoformat(given)).isoformat()
    except ValueError:
        raise UsageError(f"chat_template_date={given} is not a day; give YYYY-MM-DD, or {TODAY}") from None
