"""Handlers for a prompt and what follows it: a text that goes on, messages, or an answer in a chat."""

from collections.abc import Sequence
from typing import Any

from ascendspeed_data.chat_template import ChatTemplate
from ascendspeed_data.conversation import Message, conversation_of, variables_in
from ascendspeed_data.fields import TEMPLATE_VARIABLES
from ascendspeed_data.handlers.base import HandlerBase
from ascendspeed_data.handlers.chat import messages_of, with_system
from ascendspeed_data.handlers.instruction import history_of
from ascendspeed_data.sample import Record, Sample, Segment, text_in
from ascendspeed_data.tokenizer import Tokenizer


class CompletionHandler(HandlerBase):
    """A prompt and the text that goes on, as they stand (trl's sets of prompts and completions)."""

    name = "CompletionHandler"
    columns: Sequence[str] = ("prompt", "completion")
    summary = "prompt and completion texts, without a template, with loss on the completion"
    template = "{prompt}{completion}"
    example: Record = {"prompt": "The sky is", "completion": " blue."}  # noqa: RUF012

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the record as one sample."""
        prompt, completion = text_in(record, "prompt"), text_in(record, "completion")
        return [Sample((Segment(prompt, False), Segment(completion, True), Segment(None, True)))]


class MessagesCompletionHandler(HandlerBase):
    """A prompt and its completion as messages (trl's conversational sets), in the tokenizer's chat template."""

    name = "MessagesCompletionHandler"
    columns: Sequence[str] = ("prompt", "completion")
    optional_columns: Sequence[str] = TEMPLATE_VARIABLES.names
    summary = "prompt and completion messages in the tokenizer's chat template, with loss on the completion"
    template = "the tokenizer's chat template"
    example: Record = {  # noqa: RUF012
        "prompt": [{"role": "user", "content": "Hello"}],
        "completion": [{"role": "assistant", "content": "Hi!"}],
    }

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the samples, most often one; a completion whose answers all have weight 0 is skipped."""
        before = messages_of(_listed(record["prompt"]), "prompt")
        after = messages_of(_listed(record["completion"]), "completion")
        conversation = conversation_of([*before, *after], variables_in(record), num_context=len(before))
        if conversation_of(after).is_masked:
            return []
        return ChatTemplate.for_conversation(tokenizer, conversation).samples(conversation)


class ResponseHandler(HandlerBase):
    """A user's message and the answer, in the tokenizer's chat template."""

    name = "ResponseHandler"
    columns = ("prompt", "response")
    optional_columns = ("system", "history", *TEMPLATE_VARIABLES.names)
    summary = "prompt and response as a chat in the tokenizer's chat template, with loss on every answer"
    template = "the tokenizer's chat template"
    example: Record = {"prompt": "Name a colour.", "response": "Blue."}  # noqa: RUF012

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the samples, most often one."""
        exchanges = [*history_of(record), (text_in(record, "prompt"), text_in(record, "response"))]
        turns: list[Message] = []
        for user, answer in exchanges:
            turns += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        conversation = conversation_of(with_system(record, turns), variables_in(record))
        return ChatTemplate.for_conversation(tokenizer, conversation).samples(conversation)


def _listed(value: Any) -> Any:
    """Return one message as a list of it; any other value as it is."""
    return [value] if isinstance(value, dict) and "role" in value else value
