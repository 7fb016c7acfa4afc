"""Handlers for preference tuning: a chosen and a rejected answer to one prompt.

A pair is a document of two samples, the chosen one first. Each sample has the prompt and one answer, encoded together,
so that training and generation see the same ids at the boundary. The loss covers the answer only. Pairs with equal
answers are skipped and counted.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from ascendspeed_data.chat_template import ChatTemplate
from ascendspeed_data.conversation import Message, conversation_of, json_value, variables_in
from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import TEMPLATE_VARIABLES, filled
from ascendspeed_data.handlers.base import HandlerBase
from ascendspeed_data.handlers.chat import messages_of, with_system
from ascendspeed_data.handlers.instruction import LAYOUT, conversation, history_of
from ascendspeed_data.sample import Record, Sample, Segment, text_in
from ascendspeed_data.tokenizer import Tokenizer

ASSISTANT = "\n\nAssistant:"
"""Text before an answer in HH-RLHF."""


class PairHandlerBase(HandlerBase):
    """Default attributes of handlers that make pairs."""

    makes_pairs = True


class TextPairHandler(PairHandlerBase):
    """Prompt and answer, concatenated without a template."""

    name = "TextPairHandler"
    columns: Sequence[str] = ("prompt", "chosen", "rejected")
    summary = "prompt, chosen and rejected texts, without a template"
    template = "{prompt}{answer}"
    example: Record = {"prompt": "Q: 1 + 1?\nA:", "chosen": " 2", "rejected": " 3"}  # noqa: RUF012

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the chosen and the rejected sample."""
        prompt = text_in(record, "prompt")
        return [
            Sample((Segment(prompt, False), Segment(answer, True), Segment(None, True)))
            for answer in _answers(text_in(record, "chosen"), text_in(record, "rejected"))
        ]


class HHRLHFHandler(PairHandlerBase):
    r"""Anthropic's HH-RLHF: two transcripts with different last answers."""

    name = "HHRLHFHandler"
    columns = ("chosen", "rejected")
    summary = "HH-RLHF transcripts without a template, with loss on the last answer"
    template = "{transcript}"
    example: Record = {  # noqa: RUF012
        "chosen": "\n\nHuman: Hello\n\nAssistant: Hi!",
        "rejected": "\n\nHuman: Hello\n\nAssistant: Go away.",
    }

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the chosen and the rejected sample."""
        texts = [text_in(record, column) for column in ("chosen", "rejected")]
        prompts = [text[: text.rfind(ASSISTANT) + len(ASSISTANT)] for text in texts]
        for column, text in zip(("chosen", "rejected"), texts, strict=True):
            if ASSISTANT not in text:
                raise DataError(f"column {column!r} does not contain {ASSISTANT!r}, so it has no answer")
        if prompts[0] != prompts[1]:
            # Some transcripts differ earlier, also in user turns; then all text after the common prefix is the answer.
            shared = prompts[0][: len(_common_prefix(prompts[0], prompts[1]))]
            start_of_answer = shared.rfind(ASSISTANT)
            if start_of_answer < 0:
                raise DataError("'chosen' and 'rejected' do not start with the same prompt")
            prompts = [shared[: start_of_answer + len(ASSISTANT)]] * 2
        start = len(prompts[0])
        return [
            Sample((Segment(prompts[0], False), Segment(answer, True), Segment(None, True)))
            for answer in _answers(texts[0][start:], texts[1][start:])
        ]


class AlpacaPairHandler(PairHandlerBase):
    """Alpaca records with two answers, in the layout of `GeneralInstructionHandler`.

    The answers are columns `chosen` and `rejected` (LLaMA-Factory's ranking sets), or the two entries of a list in
    `output`, the better first (Alpaca-style comparisons, LLaMA-Factory's earlier ones).
    """

    name = "AlpacaPairHandler"
    columns = ("instruction",)
    optional_columns = ("input", "chosen", "rejected", "output", "history", "system")
    refused_columns = ("query", "context")
    summary = "Alpaca records with chosen and rejected, or output: [better, worse]"
    template = LAYOUT.replace("{user}", "{instruction}\n{input}").replace("{assistant}", "{answer}")
    example: Record = {  # noqa: RUF012
        "instruction": "Name a colour.", "input": "", "chosen": "Blue.", "rejected": "Seven.",
    }  # fmt: skip

    def samples(self, record: Record, tokenizer: object) -> list[Sample]:
        """Return the chosen and the rejected sample; earlier turns of `history` are context."""
        user = text_in(record, "instruction") + "\n" + text_in(record, "input")
        before, system = history_of(record), text_in(record, "system")
        return [
            conversation([*before, (user, answer)], first_trained=len(before), system=system)
            for answer in _answers(*self._two(record))
        ]

    def _two(self, record: Record) -> tuple[str, str]:
        if record.get("chosen") is not None or record.get("rejected") is not None:
            if record.get("chosen") is None or record.get("rejected") is None:
                raise DataError("one of the columns 'chosen' and 'rejected' is empty; a pair needs both")
            return text_in(record, "chosen"), text_in(record, "rejected")
        output = record.get("output")
        if isinstance(output, str) and output.lstrip().startswith("["):
            output = json_value(output, "column 'output'")
        if not (isinstance(output, list) and len(output) == 2 and all(isinstance(o, str) for o in output)):
            raise DataError(
                "the record has no pair; it needs columns 'chosen' and 'rejected', or two texts in 'output', the "
                "better first"
            )
        return output[0], output[1]


class MessagesPairHandler(PairHandlerBase):
    """Conversations with two last answers, in the tokenizer's chat template.

    `chosen` and `rejected` are lists of messages, or texts of the assistant: whole conversations (UltraFeedback,
    binarized), or what follows `prompt`. The prompt is a list of messages, or the text of a user message.
    """

    name = "MessagesPairHandler"
    columns = ("chosen", "rejected")
    optional_columns = ("prompt", "system", *TEMPLATE_VARIABLES.names)
    summary = "chosen and rejected messages (UltraFeedback-binarized, trl) in the tokenizer's chat template"
    template = "the tokenizer's chat template"
    example: Record = {  # noqa: RUF012
        "prompt": "Hello",
        "chosen": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}],
        "rejected": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "What?"}],
    }

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the chosen and the rejected sample."""
        return _samples(record, *self._prompt_and_endings(record), tokenizer)

    def _prompt_and_endings(self, record: Record) -> tuple[list[Message], list[list[Message]]]:
        prompt = _decoded(record.get("prompt"), "prompt")
        answers = [_decoded(record.get(column), column) for column in ("chosen", "rejected")]
        if not filled(prompt) and any(isinstance(answer, str) for answer in answers):
            raise DataError("'chosen' and 'rejected' are texts, so 'prompt' must be text or messages too")
        endings = [
            [_message("assistant", answer)]
            if isinstance(answer, str)
            else messages_of(_listed(answer), column)
            for column, answer in zip(("chosen", "rejected"), answers, strict=True)
        ]
        if isinstance(prompt, list) and prompt:
            return _after(messages_of(prompt, "prompt"), endings)
        if filled(prompt) and not isinstance(prompt, str):
            raise DataError(f"column 'prompt' holds {type(prompt).__name__}, not text or messages")
        shared = _common_prefix(*endings)
        if filled(prompt) and not any(message.get("content") == prompt for message in shared):
            if any(message["role"] in ("system", "user") for ending in endings for message in ending):
                raise DataError(
                    "the text in 'prompt' is not among the messages that 'chosen' and 'rejected' share"
                )
            return [_message("user", prompt)], endings
        if endings[0] == endings[1]:
            return endings[0], [[], []]
        return shared, [messages[len(shared) :] for messages in endings]


def _listed(answer: Any) -> Any:
    """Return one message as a list of it; any other value as it is."""
    is_message = isinstance(answer, dict) and isinstance(answer.get("role", answer.get("from")), str)
    return [answer] if is_message else answer


def _after(prompt: list[Message], endings: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    """Return prompt and endings; where both endings are whole conversations, the prompt is taken off them.

    Raises:
        DataError: only one of the endings begins with the prompt.
    """
    begins = [ending[: len(prompt)] == prompt for ending in endings]
    if any(begins) and not all(begins):
        raise DataError(
            "one of 'chosen' and 'rejected' begins with the messages of 'prompt', and the other does not; give both "
            "with them, or both without"
        )
    return prompt, [ending[len(prompt) :] for ending in endings] if all(begins) else endings


class ShareGPTPairHandler(PairHandlerBase):
    """LLaMA-Factory's preference sets in the format of ShareGPT, in the tokenizer's chat template."""

    name = "ShareGPTPairHandler"
    columns = ("conversations", "chosen", "rejected")
    optional_columns = ("system", *TEMPLATE_VARIABLES.names)
    summary = "ShareGPT conversations with a chosen and a rejected answer, in the tokenizer's chat template"
    template = "the tokenizer's chat template"
    example: Record = {  # noqa: RUF012
        "conversations": [{"from": "human", "value": "Hello"}],
        "chosen": {"from": "gpt", "value": "Hi!"},
        "rejected": {"from": "gpt", "value": "What?"},
    }

    def samples(self, record: Record, tokenizer: Tokenizer) -> list[Sample]:
        """Return the chosen and the rejected sample."""
        prompt = messages_of(record.get("conversations"), "conversations", are_turns=True)
        endings = []
        for column in ("chosen", "rejected"):
            answer = record[column]
            if isinstance(answer, str) and answer.lstrip().startswith("{"):
                answer = json_value(answer, f"column {column!r}")
            try:
                endings.append(messages_of([answer], column, are_turns=True))
            except DataError as error:
                raise DataError(f"column {column!r}: {error}") from None
        return _samples(record, prompt, endings, tokenizer)


def _samples(
    record: Record, prompt: list[Message], endings: Sequence[list[Message]], tokenizer: Tokenizer
) -> list[Sample]:
    """Return the chosen and the rejected sample, or none if the endings are equal."""
    prompt = with_system(record, prompt)
    variables = variables_in(record)
    conversations = [conversation_of([*prompt, *ending], variables, len(prompt)) for ending in endings]
    if conversations[0].messages == conversations[1].messages:
        return []
    for column, made in zip(("chosen", "rejected"), conversations, strict=True):
        if made.is_masked and not conversation_of(made.messages, num_context=len(prompt)).is_masked:
            raise DataError(f"column {column!r}: every answer has weight 0, so there is nothing to prefer")
    return [ChatTemplate.for_conversation(tokenizer, made).sample(made) for made in conversations]


def _answers(chosen: str, rejected: str) -> tuple[str, ...]:
    """Return both answers, or nothing if they are equal."""
    return () if chosen == rejected else (chosen, rejected)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _decoded(value: Any, column: str) -> Any:
    """Return the messages in a column that holds them as JSON text; any other value as it is."""
    if not (isinstance(value, str) and value.lstrip().startswith("[")):
        return value
    try:
        decoded = json_value(value, f"column {column!r}")
    except DataError:
        return value
    is_messages = isinstance(decoded, list) and all(isinstance(m, dict) and "role" in m for m in decoded)
    return decoded if decoded and is_messages else value


def _common_prefix(one: Sequence[Any], two: Sequence[Any]) -> list[Any]:
    """Return the common prefix of two sequences."""
    return [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))]
