"""Conversations laid out for a model that is to answer: as its training data was.

What follows the last user is left to the model. The same rules and the same encoding as in `asd-data preprocess`, so
that the ids before an answer are those that it was trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ascendspeed_data.chat_template import ChatTemplate, Message
from ascendspeed_data.encoding import encode_samples
from ascendspeed_data.errors import ConfigError, DataError, did_you_mean
from ascendspeed_data.fast_tokenizer import ExactEncoder
from ascendspeed_data.handlers import Part, Sample
from ascendspeed_data.handlers.chat import MessagesHandler, ShareGPTHandler
from ascendspeed_data.handlers.instruction import (
    USER,
    BelleMultiTurnInstructionHandler,
    BelleMultiTurnInstructionHandler2023,
    GeneralInstructionHandler,
    LeetcodePythonInstructionHandler,
    Turn,
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
from ascendspeed_data.job import read_chat_template
from ascendspeed_data.manifest import DatasetManifest
from ascendspeed_data.tokenizer import Tokenizer

NAMES = ("tokenizer", "instruction", "baichuan2", "hh-rlhf", "plain")
"""Layouts that can be asked for by name."""

HH_USER = "\n\nHuman: "
"""What stands before a question in HH-RLHF."""

_OF_TEMPLATE = (
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
}
_WITHOUT_ENDS = (BelleMultiTurnInstructionHandler2023.name, MOSSInstructionHandler2023.name)


@dataclass(frozen=True)
class PromptLayout:
    """How a conversation is laid out before an answer.

    Attributes:
        name: for people.
        tokenizer: of the model.
        sample: makes a sample of the messages.
        append_eod: whether turns end with the end-of-sequence id.
        end_ids: ids that end an answer, besides those of the model.
        stop: texts that end an answer, where nothing else does.
    """

    name: str
    tokenizer: Tokenizer
    sample: Callable[[Sequence[Message]], Sample]
    append_eod: bool = True
    end_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation, whose last message is the user's.

        Raises:
            DataError: messages that the layout has no place for.
        """
        encoder = ExactEncoder(self.tokenizer)
        ((ids, _),) = encode_samples([self.sample(messages)], self.tokenizer, encoder, [], self.append_eod)
        return [int(token) for token in ids]


def recorded_layout(manifest: DatasetManifest, tokenizer: Tokenizer) -> PromptLayout | None:
    """Return the layout of the data that a manifest describes; `None` for plain text.

    Raises:
        DataError: it was made by a handler whose layout is not known here.
    """
    handler, append_eod = manifest.handler, manifest.append_eod
    if manifest.kind == "text":
        return None
    if handler in _OF_TEMPLATE:
        return _of_template(manifest.template, tokenizer, "the chat template of the training data")
    if handler in _BY_NAME:
        return layout_named(_BY_NAME[handler], tokenizer)
    if handler in (*_OF_INSTRUCTIONS, *_WITHOUT_ENDS):
        has_ends = append_eod and handler not in _WITHOUT_ENDS
        return _of_instructions(handler, tokenizer, handler in _WITH_INPUT, has_ends)
    raise DataError(
        f"the model was trained on data of {handler}, whose template is not known; give --chat-template, one of "
        f"{', '.join(NAMES)} or a file"
    )


def layout_named(name: str, tokenizer: Tokenizer) -> PromptLayout:
    """Return a layout by its name, or that of a Jinja file.

    Raises:
        ConfigError: neither is there.
        DataError: the tokenizer has no template, or it is not valid.
    """
    if name == "tokenizer":
        ChatTemplate.of(tokenizer)
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
    if Path(name).is_file():
        return _of_template(read_chat_template(Path(name)), tokenizer, f"the chat template {name}")
    raise ConfigError(
        f"chat_template={name} is neither a file nor one of {', '.join(NAMES)}{did_you_mean(name, NAMES)}"
    )


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """Return what user and assistant said in turn; of the last turn the answer is empty.

    Raises:
        DataError: a system message, or roles that do not alternate.
    """
    roles = [message["role"] for message in messages]
    if "system" in roles:
        raise DataError("this template has no place for a system message; leave --system out")
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise DataError("messages do not alternate between user and assistant and end with the user")
    texts = [str(message["content"]) for message in messages]
    return list(zip(texts[::2], [*texts[1::2], ""], strict=True))


def _of_template(source: str, tokenizer: Tokenizer, name: str) -> PromptLayout:
    template = ChatTemplate.of(tokenizer, source)
    return PromptLayout(
        name,
        tokenizer,
        lambda messages: template.prompt(list(messages)),
        append_eod=False,
        end_ids=template.end_of_turn(),
    )


def _of_instructions(name: str, tokenizer: Tokenizer, has_input: bool, has_ends: bool) -> PromptLayout:
    """Lay out as `handlers.instruction.conversation` does; records with an input column have an empty line."""

    def sample(messages: Sequence[Message]) -> Sample:
        turns = [(user + "\n" if has_input else user, answer) for user, answer in turns_of(messages)]
        # The last two parts are the answer and the end after it.
        return Sample(conversation(turns, first_trained=len(turns), end_of_each=has_ends).parts[:-2])

    stop = () if has_ends else (f"\n{USER}",)
    return PromptLayout(name, tokenizer, sample, append_eod=has_ends, stop=stop)


def _baichuan2(messages: Sequence[Message]) -> Sample:
    parts: list[Part] = []
    for user, assistant in turns_of(messages):
        speakers = ((BAICHUAN2_USER, user), (BAICHUAN2_ASSISTANT, assistant))
        for speaker, text in speakers:
            parts += [Part(speaker, False), Part(text, False)]
    return Sample(tuple(parts[:-1]), surrounded=False, each_text_alone=True)


def _hh_rlhf(messages: Sequence[Message]) -> Sample:
    texts = [f"{HH_USER}{user}{HH_ASSISTANT} {answer}" for user, answer in turns_of(messages)]
    return Sample((Part("".join(texts).removesuffix(" "), False),))


def _plain(messages: Sequence[Message]) -> Sample:
    texts = [text for turn in turns_of(messages) for text in turn]
    return Sample(tuple(Part(text, False) for text in texts if text))
