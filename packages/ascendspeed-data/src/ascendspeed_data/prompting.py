"""Prompt a model with a conversation in the layout of its training data.

The rules and the encoding are those of `asd-data preprocess`, so the ids before an answer are the ids of training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ascendspeed_data.chat_template import ChatTemplate, chat_template_named, variables_read_by
from ascendspeed_data.content_forms import joined_text
from ascendspeed_data.conversation import Message, conversation_of
from ascendspeed_data.errors import ConfigError, DataError, did_you_mean
from ascendspeed_data.fast_tokenizer import ExactEncoder
from ascendspeed_data.fields import filled
from ascendspeed_data.handlers import Sample, Segment
from ascendspeed_data.handlers.chat import MessagesHandler, ShareGPTHandler
from ascendspeed_data.handlers.completion import (
    CompletionHandler,
    MessagesCompletionHandler,
    ResponseHandler,
)
from ascendspeed_data.handlers.instruction import (
    USER,
    BelleMultiTurnInstructionHandler,
    BelleMultiTurnInstructionHandler2023,
    Exchange,
    GeneralInstructionHandler,
    LeetcodePythonInstructionHandler,
    conversation,
)
from ascendspeed_data.handlers.moss import (
    BAICHUAN2_ASSISTANT,
    BAICHUAN2_USER,
    MOSSInstructionHandler,
    MOSSInstructionHandler2023,
    MOSSMultiTurnHandler,
    MOSSMultiTurnHandler2023,
)
from ascendspeed_data.handlers.pairs import (
    ASSISTANT as HH_ASSISTANT,
)
from ascendspeed_data.handlers.pairs import (
    AlpacaPairHandler,
    HHRLHFHandler,
    MessagesPairHandler,
    ShareGPTPairHandler,
    TextPairHandler,
)
from ascendspeed_data.literal_pieces import LiteralTokenizer, literal_samples
from ascendspeed_data.manifest import DatasetManifest
from ascendspeed_data.sample_encoding import encode_samples
from ascendspeed_data.template_values import TemplateValues
from ascendspeed_data.tokenizer import Tokenizer

LAYOUT_NAMES = ("tokenizer", "instruction", "baichuan2", "hh-rlhf", "plain")
"""Names of the built-in layouts."""

HH_USER = "\n\nHuman: "
"""Text before a question in HH-RLHF."""

_OF_TEMPLATE = (
    MessagesCompletionHandler.name,
    ResponseHandler.name,
    MessagesHandler.name,
    ShareGPTHandler.name,
    MessagesPairHandler.name,
    ShareGPTPairHandler.name,
)
_OF_INSTRUCTIONS = (
    GeneralInstructionHandler.name,
    LeetcodePythonInstructionHandler.name,
    BelleMultiTurnInstructionHandler.name,
    MOSSInstructionHandler.name,
    MOSSMultiTurnHandler.name,
    AlpacaPairHandler.name,
)
_WITH_INPUT = (GeneralInstructionHandler.name, AlpacaPairHandler.name)
_BY_NAME = {
    MOSSMultiTurnHandler2023.name: "baichuan2",
    HHRLHFHandler.name: "hh-rlhf",
    TextPairHandler.name: "plain",
    CompletionHandler.name: "plain",
}
_WITHOUT_ENDS = (BelleMultiTurnInstructionHandler2023.name, MOSSInstructionHandler2023.name)


@dataclass(frozen=True)
class PromptLayout:
    """Layout of a conversation up to the answer of the model.

    Attributes:
        name: shown to users.
        tokenizer: of the model.
        sample: turns messages into a sample.
        append_eod: whether each answer ends with the end-of-sequence id.
        end_ids: ids that end an answer, besides those of the model.
        stop: strings that end an answer if no id does.
        reads: variables that its chat template reads; none if it has no chat template.
        sources: its chat template, if it has one.
        template: that template, for conversations with tools too.
    """

    name: str
    tokenizer: Tokenizer
    sample: Callable[[Sequence[Message]], Sample]
    append_eod: bool = True
    end_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    sources: tuple[str, ...] = ()
    template: ChatTemplate | None = None

    def with_tools(self, tools: Any, variables: Mapping[str, Any] | None = None) -> "PromptLayout":
        """Return the layout with tools that the model may call, and further variables of its template.

        Raises:
            ConfigError: the layout is no chat template.
        """
        template = self.template
        if template is None:
            raise ConfigError(
                f"{'variables' if variables else 'tools'} are for chat templates, and {self.name} has no place for "
                "them; leave them out"
            )
        return replace(self, sample=lambda messages: template.prompt(list(messages), tools, variables))

    def ids(self, messages: Sequence[Message], parse_special: bool = False) -> list[int]:
        """Return the ids of a conversation that ends with a message of the user.

        Args:
            messages: of the conversation.
            parse_special: read special pieces that messages spell as control; otherwise they are text.

        Raises:
            DataError: the layout does not support the messages.
        """
        return self.ids_and_unused(messages, parse_special)[0]

    def ids_and_unused(
        self, messages: Sequence[Message], parse_special: bool = False
    ) -> tuple[list[int], tuple[str, ...]]:
        """Return what `ids` returns, and the keys of messages that have no effect, see `fields.message_key`."""
        sample, tokenizer = self.rendered(messages, parse_special)
        encoder = ExactEncoder(tokenizer)
        ((ids, _),) = encode_samples([sample], tokenizer, encoder, [], self.append_eod)
        return [int(token) for token in ids], tuple(sample.unused)

    def rendered(self, messages: Sequence[Message], parse_special: bool = False) -> tuple[Sample, Tokenizer]:
        """Return a conversation as the layout writes it, and the tokenizer that reads it.

        Special pieces that messages spell have stand-ins there, which this tokenizer reads as their text.

        Args:
            messages: of the conversation.
            parse_special: as in `ids`.

        Raises:
            DataError: the layout does not support the messages.
        """
        sample = self.sample(messages)
        if not parse_special:
            literal = LiteralTokenizer(self.tokenizer, self.sources)
            masked = literal_samples(lambda given: [self.sample(given)], list(messages), [sample], literal)
            if masked is not None:
                return masked[0], literal
        return sample, self.tokenizer


def recorded_layout(manifest: DatasetManifest, tokenizer: Tokenizer) -> PromptLayout | None:
    """Return the layout of the dataset that a manifest describes; `None` for plain text.

    Raises:
        DataError: the layout of its handler is unknown.
    """
    handler, append_eod = manifest.handler, manifest.append_eod
    if manifest.kind == "text":
        return None
    if handler in _OF_TEMPLATE:
        given = tokenizer.template_values
        values = given.with_kwargs({**manifest.chat_template_kwargs, **given.kwargs})
        return _of_template(manifest.template, tokenizer, "the chat template of the training data", values)
    if handler in _BY_NAME:
        return layout_named(_BY_NAME[handler], tokenizer)
    if handler in (*_OF_INSTRUCTIONS, *_WITHOUT_ENDS):
        has_ends = append_eod and handler not in _WITHOUT_ENDS
        return _of_instructions(handler, tokenizer, handler in _WITH_INPUT, has_ends)
    raise DataError(
        f"the model was trained on data of the handler {handler}, whose layout is unknown; give --chat-template: "
        f"one of {', '.join(LAYOUT_NAMES)}, or a file"
    )


def layout_named(name: str, tokenizer: Tokenizer) -> PromptLayout:
    """Return the layout with this name, of one of the tokenizer's chat templates, or of a Jinja file.

    Raises:
        ConfigError: `name` is neither a layout nor a template nor a file.
        DataError: the tokenizer has no chat template, or the template is not valid.
    """
    if name == "tokenizer":
        ChatTemplate.from_tokenizer(tokenizer)
        assert tokenizer.chat_template is not None
        return _of_template(tokenizer.chat_template, tokenizer, "the tokenizer's chat template")
    if name == "instruction":
        return _of_instructions("the instruction template", tokenizer, True, True)
    if name == "baichuan2":
        return PromptLayout(
            "ids 195 and 196 of Baichuan2", tokenizer, _baichuan2, append_eod=False, end_ids=(BAICHUAN2_USER,)
        )
    if name == "hh-rlhf":
        stop = (HH_USER.rstrip(),)
        return PromptLayout("the transcripts of HH-RLHF", tokenizer, _hh_rlhf, append_eod=False, stop=stop)
    if name == "plain":
        return PromptLayout("no template", tokenizer, _plain, append_eod=False)
    source = chat_template_named(name, tokenizer)
    if source is not None:
        return _of_template(source, tokenizer, f"the chat template {name}")
    known = [*LAYOUT_NAMES, *sorted(tokenizer.named_chat_templates)]
    raise ConfigError(
        f"chat_template={name} is neither a file nor one of {', '.join(known)}{did_you_mean(name, known)}"
    )


def exchanges_of(messages: Sequence[Message]) -> list[Exchange]:
    """Return pairs of user message and answer; the last answer is empty.

    Raises:
        DataError: there is a system message, or the roles do not alternate.
    """
    read = conversation_of(messages).messages
    for number, message in enumerate(read, 1):
        others = [name for name in message if name not in ("role", "content") and filled(message[name])]
        if others:
            raise DataError(f"message {number}: this chat template has no place for {others[0]!r}; remove it")
    roles = [message["role"] for message in read]
    if "system" in roles:
        raise DataError("this chat template has no place for a system message; leave --system out")
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise DataError(
            "messages must alternate between user and assistant, and the last one must be of the user"
        )
    texts = [joined_text(message["content"]) for message in read]
    return list(zip(texts[::2], [*texts[1::2], ""], strict=True))


def _of_template(
    source: str, tokenizer: Tokenizer, name: str, values: TemplateValues | None = None
) -> PromptLayout:
    template = ChatTemplate.from_tokenizer(tokenizer, source, values=values)
    return PromptLayout(
        name,
        tokenizer,
        lambda messages: template.prompt(list(messages)),
        append_eod=False,
        end_ids=template.end_of_turn(),
        reads=frozenset(variables_read_by(source)),
        sources=(source,),
        template=template,
    )


def _of_instructions(name: str, tokenizer: Tokenizer, has_input: bool, has_ends: bool) -> PromptLayout:
    """Use the layout of `handlers.instruction.conversation`; handlers with an input column add an empty line."""

    def sample(messages: Sequence[Message]) -> Sample:
        exchanges = [(user + "\n" if has_input else user, answer) for user, answer in exchanges_of(messages)]
        # The last two segments are the answer and the end-of-sequence id.
        return Sample(
            conversation(exchanges, first_trained=len(exchanges), end_of_each=has_ends).segments[:-2]
        )

    stop = () if has_ends else (f"\n{USER}",)
    return PromptLayout(name, tokenizer, sample, append_eod=has_ends, stop=stop)


def _baichuan2(messages: Sequence[Message]) -> Sample:
    segments: list[Segment] = []
    for user, assistant in exchanges_of(messages):
        speakers = ((BAICHUAN2_USER, user), (BAICHUAN2_ASSISTANT, assistant))
        for speaker, text in speakers:
            segments += [Segment(speaker, False), Segment(text, False)]
    return Sample(tuple(segments[:-1]), add_special_tokens=False, encode_separately=True)


def _hh_rlhf(messages: Sequence[Message]) -> Sample:
    texts = [f"{HH_USER}{user}{HH_ASSISTANT} {answer}" for user, answer in exchanges_of(messages)]
    return Sample((Segment("".join(texts).removesuffix(" "), False),))


def _plain(messages: Sequence[Message]) -> Sample:
    texts = [text for turn in exchanges_of(messages) for text in turn]
    return Sample(tuple(Segment(text, False) for text in texts if text))
