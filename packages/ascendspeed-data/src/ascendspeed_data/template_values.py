"""Values that chat templates get besides the conversation: variables, the day, and what to do with thoughts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import Any, Literal, cast, get_args

from ascendspeed_data.conversation import RESERVED_VARIABLES
from ascendspeed_data.errors import ConfigError

Reasoning = Literal["keep", "drop", "last"]
"""What to do with the thoughts of assistant messages: keep all, drop all, or keep those of the last turn only."""

KWARGS_FLAG, DATE_FLAG = "--chat-template-kwargs", "--chat-template-date"
TODAY = "today"
"""The day of the run, as a value of the flag."""

KWARGS_HELP = (
    'JSON object with variables of the chat template, such as {"enable_thinking": false}; '
    "a record's own values come first."
)
DATE_HELP = "Day that the chat template's strftime_now gives: YYYY-MM-DD, or today."


@dataclass(frozen=True)
class TemplateValues:
    """Values that every rendering of a chat template gets.

    Attributes:
        kwargs_json: variables, as the JSON text of an object.
        day: `YYYY-MM-DD` for `strftime_now`, or `now` for the clock; `None`: templates have no `strftime_now`.
        reasoning: what to do with thoughts in training data.
    """

    kwargs_json: str = "{}"
    day: str | None = None
    reasoning: Reasoning = "keep"

    @classmethod
    def of_flags(
        cls, kwargs: str | None, day: str | None, reasoning: str = "keep", clock: bool = False
    ) -> "TemplateValues":
        """Return the values of a command's flags.

        Args:
            kwargs: JSON text of an object.
            day: `YYYY-MM-DD` or `today`.
            reasoning: one of `Reasoning`.
            clock: whether templates get the clock if no day is given, as in a chat.

        Raises:
            ConfigError: a value cannot be read, or sets a variable that templates get anyway.
        """
        if reasoning not in get_args(Reasoning):
            raise ConfigError(
                f"reasoning={reasoning} is unknown; choose from {', '.join(get_args(Reasoning))}"
            )
        made = cls(reasoning=cast(Reasoning, reasoning), day="now" if clock else None)
        if day is not None:
            made = replace(made, day=_day(day))
        return made if kwargs is None else made.with_kwargs(_object(kwargs))

    @property
    def kwargs(self) -> dict[str, Any]:
        """The variables."""
        found: dict[str, Any] = json.loads(self.kwargs_json)
        return found

    @property
    def strftime_now(self) -> Callable[[str], str] | None:
        """The function of this name for templates, as transformers gives it."""
        day = self.day
        if day is None:
            return None
        return lambda form: (datetime.now() if day == "now" else datetime.fromisoformat(day)).strftime(form)

    def with_kwargs(self, more: Mapping[str, Any]) -> "TemplateValues":
        """Return these values with further variables, which come before those that are there."""
        joined = {**self.kwargs, **more}
        return replace(self, kwargs_json=json.dumps(joined, ensure_ascii=False, sort_keys=True))

    def check_read(self, read: set[str]) -> None:
        """Raise `ConfigError` for a variable that no template reads.

        Args:
            read: the variables that the templates read.
        """
        for name in self.kwargs:
            if name not in read:
                raise ConfigError(
                    f"chat_template_kwargs sets {name!r}, which the chat template does not read; leave it out"
                )


def _day(given: str) -> str:
    if given == TODAY:
        return date.today().isoformat()
    try:
        return date.fromisoformat(given).isoformat()
    except ValueError:
        raise ConfigError(f"chat_template_date={given} is not a day; give YYYY-MM-DD, or {TODAY}") from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ConfigError(
            f"chat_template_kwargs={text} is not a JSON object; give one, such as "
            """'{"enable_thinking": false}'"""
        )
    for name in value:
        if name in RESERVED_VARIABLES:
            raise ConfigError(
                f"chat_template_kwargs sets {name!r}, which the template gets anyway; leave it out"
            )
    return value
