"""Prompts of benchmarks that are conversations: as text, and as the ids that a chat with the model would feed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ascendspeed_data.command_line import log
from ascendspeed_data.conversation import Message
from ascendspeed_data.errors import ConfigError, DataError
from ascendspeed_data.literal_pieces import LiteralTokenizer
from ascendspeed_data.prompting import PromptLayout
from ascendspeed_data.template_values import TemplateValues
from ascendspeed_infer.scoring import IdPair


def values_of(template_values: Mapping[str, Any], day: str | None) -> TemplateValues:
    """Return what chat templates get, from the arguments of `start_chat`.

    Raises:
        ConfigError: a variable is one that templates get anyway.
    """
    kwargs = json.dumps(dict(template_values), ensure_ascii=False) if template_values else None
    return TemplateValues.of_flags(kwargs, day)


class ChatPrompts:
    """Conversations as a chat template writes them.

    Args:
        layout: of the model.
        values: what the template gets.

    Raises:
        ConfigError: the layout is no chat template, or does not read a value.
    """

    def __init__(self, layout: PromptLayout, values: TemplateValues) -> None:
        if layout.template is None:
            raise ConfigError(
                f"the model was trained with {layout.name}, which is no chat template; leave --apply-chat-template out"
            )
        values.check_read(set(layout.reads))
        self._layout = layout
        self._literal = LiteralTokenizer(layout.tokenizer, layout.sources)
        self._says_left_out = True

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, besides those of the model."""
        return self._layout.end_ids

    def details(self) -> dict[str, str]:
        """Return what a report says of the template."""
        digest = hashlib.sha256("".join(self._layout.sources).encode()).hexdigest()
        return {"chat_template": self._layout.name, "chat_template_sha256": digest}

    def render(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[Message]]:
        """Return a conversation up to the answer, and the messages that it shows.

        A template that refuses a system message gets the conversation without it, as in lm-evaluation-harness.

        Raises:
            DataError: the template does not support the conversation.
        """
        sent: list[Message] = [dict(one) for one in messages]
        try:
            return self._text(sent), sent
        except DataError:
            if sent[0]["role"] != "system":
                raise
            try:
                text = self._text(sent[1:])
            except DataError:
                text = None
            if text is None:
                raise
        if self._says_left_out:
            self._says_left_out = False
            log("the chat template takes no system message, so the task's is left out")
        return text, sent[1:]

    def ids(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Return the ids of a conversation up to the answer; control that its texts spell is text."""
        return tuple(self._layout.ids([dict(one) for one in messages]))

    def pairs(self, requests: Sequence[tuple[tuple[Mapping[str, str], ...], str]]) -> list[IdPair]:
        """Return conversations and continuations as ids.

        Both are encoded as one text, and spaces and line ends at the end of the conversation count to the continuation:
        the rule of lm-evaluation-harness.
        """
        found, last, rendered = [], None, None
        for messages, continuation in requests:
            if rendered is None or messages != last:
                last, rendered = messages, self._layout.rendered([dict(one) for one in messages])
            sample, tokenizer = rendered
            if self._literal.spelled(continuation):
                tokenizer, shown = self._literal, self._literal.mask(continuation)
            else:
                shown = continuation
            text = "".join(str(one.content) for one in sample.segments)
            before, _ = tokenizer.encode_rendered(text.rstrip())
            whole, _ = tokenizer.encode_rendered(text + shown)
            found.append(IdPair(tuple(whole[: len(before)]), tuple(whole[len(before) :]), continuation))
        return found

    def _text(self, messages: list[Message]) -> str:
        return "".join(str(one.content) for one in self._layout.sample(messages).segments)
