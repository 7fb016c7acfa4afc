"""A conversation with a model, whose history is kept within the model's context."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ascendspeed_core.weights import WeightSource
from ascendspeed_data.command_line import log
from ascendspeed_data.conversation import Message
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.fields import REASONING
from ascendspeed_data.manifest import DatasetManifest
from ascendspeed_data.prompting import LAYOUT_NAMES, PromptLayout, layout_named, recorded_layout
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_data.tokenizer_config import TOOL_USE
from ascendspeed_infer.channels import ChannelReader, has_channels
from ascendspeed_infer.config import AnswerConfig
from ascendspeed_infer.requests import StreamedText
from ascendspeed_infer.text_generator import TextGenerator, check_text
from ascendspeed_infer.thinking import OPEN, split_thoughts
from ascendspeed_infer.tool_calls import ToolCalls, find_tool_calls


class Chat:
    """One conversation.

    Args:
        model: generates the answers.
        layout: how messages become a prompt.
        sampling: how answers are generated; `max_new_tokens` is the longest answer.
        system: the system message before the first turn.
        tools: that the model may call; the layout shows them, and calls of them are found in answers.
    """

    def __init__(
        self,
        model: TextGenerator,
        layout: PromptLayout,
        sampling: AnswerConfig,
        system: str | None = None,
        tools: list[Any] | None = None,
    ) -> None:
        self.model, self._sampling, self.tools = model, sampling, tools
        self.layout = layout if tools is None else layout.with_tools(tools)
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []
        self.left_out_turns = 0
        """Turns at the beginning that no longer fit."""
        self.opened_thoughts = False
        """Whether the prompt of the last answer opened its thoughts."""
        self.called: ToolCalls | None = None
        """The calls of tools in the last answer, if it makes any."""
        self._num_answers = 0
        self._session = model.engine.new_session()
        self._limit = model.engine.max_model_len
        self._reserved = min(sampling.max_new_tokens, self._limit // 2)
        # A layout that cannot take the system message says so before the first message.
        self._ids([{"role": "user", "content": "Hello"}])

    def clear(self) -> None:
        """Begin a new conversation."""
        self.messages, self.left_out_turns, self.called = [], 0, None

    def history(self) -> list[Message]:
        """Return the conversation with its system message."""
        return [*self._system, *self.messages]

    def go_on_with(self, messages: list[Message]) -> None:
        """Take the place of the conversation; a system message at the beginning replaces the present one.

        Raises:
            DataError: the layout does not support the messages.
        """
        has_system = bool(messages) and messages[0].get("role") == "system"
        system, rest = (messages[:1], messages[1:]) if has_system else (self._system, messages)
        self.layout.ids([*system, *rest, {"role": "user", "content": "Hello"}], self._sampling.parse_special)
        self.clear()
        self._system, self.messages = list(system), list(rest)

    def open_calls(self) -> list[Any]:
        """Return the calls of tools at the end of the history that have no result yet."""
        for results, message in enumerate(reversed(self.messages)):
            if message["role"] != "tool":
                return list(message.get("tool_calls") or ())[results:]
        return []

    def add_result(self, text: str) -> bool:
        """Give the result of the first call that has none; return whether all have one now."""
        check_text(text)
        call = self.open_calls()[0]
        name = call["function"]["name"]
        made: Message = {"role": "tool", "tool_call_id": call["id"], "name": name, "content": text}
        self.messages = [*self.messages, made]
        return not self.open_calls()

    def say(self, text: str | None) -> Iterator[StreamedText]:
        """Answer a message, token by token; the whole answer joins the history at the end.

        Without a message the last results of tools are answered.

        The oldest turns are left out when the history leaves no room for an answer of `max_new_tokens`, or of half of
        the model's context if that is less.

        Raises:
            AscendSpeedError: the message alone is too long.
        """
        asked: list[Message] = []
        if text is not None:
            check_text(text)
            asked = [{"role": "user", "content": text}]
        ids, kept = self._fit_history([*self.messages, *asked])
        gone = self.messages[: len(self.messages) + len(asked) - len(kept)]
        self.left_out_turns += sum(one["role"] == "user" for one in gone)
        self.messages, self.called = kept[: len(kept) - len(asked)], None
        options = self._sampling.effective_options()
        stop = (*self._sampling.stop, *self.layout.stop)
        eos_token_ids = self._sampling.eos_token_ids or self.model.eos_token_ids()
        options |= {
            "max_new_tokens": min(self._sampling.max_new_tokens, self._limit - len(ids)),
            "seed": self._sampling.seed + self._num_answers,
            "stop": stop,
        }
        if not self._sampling.ignore_eos:
            options["eos_token_ids"] = tuple(dict.fromkeys((*eos_token_ids, *self.layout.end_ids))) or None
        self._num_answers += 1
        self.opened_thoughts = self.model.tokenizer.decode(ids[-4:]).rstrip().endswith(OPEN)
        answer = ""
        channels = ChannelReader(self.model.tokenizer) if has_channels(self.layout.sources) else None
        try:
            for token in self.model.stream(ids, session=self._session, **options):
                if channels is not None:
                    token = replace(token, text=channels.feed(token.token_id, token.text))
                answer += token.text
                yield token
        finally:
            # An answer that was interrupted counts as far as it got.
            self.messages = [*self.messages, *asked, self._message(answer.strip())]

    def _message(self, answer: str) -> Message:
        """Return an answer as a message; thoughts and calls of tools become what the chat template takes."""
        if self.tools is not None:
            before = sum(len(one.get("tool_calls") or ()) for one in self.messages)
            self.called = find_tool_calls(answer, before, self.opened_thoughts, self.tools)
        text = answer if self.called is None else self.called.text
        message: Message = {"role": "assistant", "content": text}
        if any(name in source for name in REASONING for source in self.layout.sources):
            thoughts, message["content"] = split_thoughts(text, self.opened_thoughts)
            message |= {"reasoning_content": thoughts} if thoughts.strip() else {}
        elif self.opened_thoughts:
            # The template finds thoughts in the content, where the prompt's mark belongs to them.
            message["content"] = f"{OPEN}\n{text}"
        return message if self.called is None else message | {"tool_calls": self.called.calls}

    def _ids(self, messages: list[Message]) -> list[int]:
        return self.layout.ids([*self._system, *messages], self._sampling.parse_special)

    def _fit_history(self, messages: list[Message]) -> tuple[list[int], list[Message]]:
        """Leave out the oldest turns, each up to the next message of the user, until an answer fits."""
        while True:
            ids = self._ids(messages)
            if len(ids) + self._reserved <= self._limit:
                return ids, messages
            later = [number for number, one in enumerate(messages) if number and one["role"] == "user"]
            if not later:
                raise AscendSpeedError(
                    f"the message has {len(ids)} tokens with its template; with {self._reserved} for the answer that "
                    f"is more than max_position_embeddings={self._limit} of the model; shorten it or lower "
                    "--max-new-tokens"
                )
            messages = messages[later[0] :]


def choose_layout(
    source: WeightSource,
    tokenizer: Tokenizer,
    template: str | None,
    say: Callable[[str], None] = log,
    has_tools: bool = False,
) -> PromptLayout:
    """Return the layout of conversations: the one recorded with the checkpoint, or else the tokenizer's own.

    Args:
        source: of the model.
        tokenizer: of the model.
        template: name or file of another one, which gives a warning if one is recorded.
        say: where lines for the user go.
        has_tools: whether tools are declared, for which a tokenizer may have a template of its own.

    Raises:
        AscendSpeedError: neither the checkpoint nor the tokenizer has a template.
    """
    manifest = source.data_manifest
    is_recorded = manifest is not None and manifest.kind != "text"
    if template is not None:
        layout = layout_named(template, tokenizer)
        recorded = _recorded(manifest, tokenizer, is_strict=False) if is_recorded else None
        probe: list[Message] = [{"role": "user", "content": "Hello"}]
        if is_recorded and (recorded is None or recorded.ids(probe) != layout.ids(probe)):
            assert manifest is not None
            say(
                f"warning: the model was trained with the template of {manifest.handler}, and is used with "
                f"{layout.name}: its answers may be worse. Leave --chat-template out to use the recorded one"
            )
        return layout
    if is_recorded:
        recorded = _recorded(manifest, tokenizer, is_strict=True)
        assert recorded is not None
        say(f"template: {recorded.name} (recorded with the checkpoint)")
        return recorded
    if has_tools and TOOL_USE in tokenizer.named_chat_templates:
        say(f"template: the tokenizer's {TOOL_USE} (none is recorded with the checkpoint)")
        return layout_named(TOOL_USE, tokenizer)
    if tokenizer.chat_template is not None:
        say("template: the tokenizer's own (none is recorded with the checkpoint)")
        return layout_named("tokenizer", tokenizer)
    raise ConfigError(
        f"neither {source.path} nor its tokenizer says how a conversation is laid out; give --chat-template, one of "
        f"{', '.join(LAYOUT_NAMES)} or a Jinja file (plain joins the texts as they are)"
    )


def _recorded(manifest: DatasetManifest | None, tokenizer: Tokenizer, is_strict: bool) -> PromptLayout | None:
    try:
        return None if manifest is None else recorded_layout(manifest, tokenizer)
    except AscendSpeedError:
        if is_strict:
            raise
        return None
