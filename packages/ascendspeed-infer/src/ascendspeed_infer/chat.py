"""A conversation with a model, whose history is kept within the model's context."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from ascendspeed_core.weights import WeightSource
from ascendspeed_data.command_line import log
from ascendspeed_data.conversation import Message
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.manifest import DatasetManifest
from ascendspeed_data.prompting import LAYOUT_NAMES, PromptLayout, layout_named, recorded_layout
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.config import AnswerConfig
from ascendspeed_infer.requests import StreamedText
from ascendspeed_infer.text_generator import TextGenerator, check_text
from ascendspeed_infer.thinking import OPEN, Part, ThoughtSplitter

HELP = "/help"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
QUIT = ("q", "quit", "exit")
CLEAR = ("clear", "new")
Thinking = Literal["shown", "dimmed", "hidden"]
"""How thoughts before an answer are shown."""

USER, ANSWER = "You >> ", "AscendSpeed: "


class Chat:
    """One conversation.

    Args:
        model: generates the answers.
        layout: how messages become a prompt.
        sampling: how answers are generated; `max_new_tokens` is the longest answer.
        system: the system message before the first turn.
    """

    def __init__(
        self,
        model: TextGenerator,
        layout: PromptLayout,
        sampling: AnswerConfig,
        system: str | None = None,
    ) -> None:
        self.model, self.layout, self._sampling = model, layout, sampling
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []
        self.left_out_turns = 0
        """Turns at the beginning that no longer fit."""
        self.opened_thoughts = False
        """Whether the prompt of the last answer opened its thoughts."""
        self._num_answers = 0
        self._session = model.engine.new_session()
        self._limit = model.engine.max_model_len
        self._reserved = min(sampling.max_new_tokens, self._limit // 2)
        # A layout that cannot take the system message says so before the first message.
        self._ids([{"role": "user", "content": "Hello"}])

    def clear(self) -> None:
        """Begin a new conversation."""
        self.messages, self.left_out_turns = [], 0

    def say(self, text: str) -> Iterator[StreamedText]:
        """Answer a message, token by token; the whole answer joins the history at the end.

        The oldest turns are left out when the history leaves no room for an answer of `max_new_tokens`, or of half of
        the model's context if that is less.

        Raises:
            AscendSpeedError: the message alone is too long.
        """
        check_text(text)
        message: Message = {"role": "user", "content": text}
        ids, kept = self._fit_history([*self.messages, message])
        self.left_out_turns += (len(self.messages) + 1 - len(kept)) // 2
        self.messages = kept[:-1]
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
        try:
            for token in self.model.stream(ids, session=self._session, **options):
                answer += token.text
                yield token
        finally:
            # An answer that was interrupted counts as far as it got.
            self.messages = [*self.messages, message, {"role": "assistant", "content": answer.strip()}]

    def _ids(self, messages: list[Message]) -> list[int]:
        return self.layout.ids([*self._system, *messages], self._sampling.parse_special)

    def _fit_history(self, messages: list[Message]) -> tuple[list[int], list[Message]]:
        """Leave out the oldest turns until an answer fits."""
        while True:
            ids = self._ids(messages)
            if len(ids) + self._reserved <= self._limit:
                return ids, messages
            if len(messages) == 1:
                raise AscendSpeedError(
                    f"the message has {len(ids)} tokens with its template; with {self._reserved} for the answer that "
                    f"is more than max_position_embeddings={self._limit} of the model; shorten it or lower "
                    "--max-new-tokens"
                )
            messages = messages[2:]


def choose_layout(
    source: WeightSource, tokenizer: Tokenizer, template: str | None, say: Callable[[str], None] = log
) -> PromptLayout:
    """Return the layout of conversations: the one recorded with the checkpoint, or else the tokenizer's own.

    Args:
        source: of the model.
        tokenizer: of the model.
        template: name or file of another one, which gives a warning if one is recorded.
        say: where lines for the user go.

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


def converse(
    chat: Chat,
    read: Callable[[str], str | None],
    write: Callable[[str], None],
    thinking: Thinking = "shown",
) -> None:
    """Ask and answer until the user quits.

    Args:
        chat: the conversation.
        read: shows a prompt and returns the user's line; `None` at the end of the input.
        write: shows text to the user.
        thinking: how thoughts before an answer are shown: as they are, dimmed, or not at all.
    """
    write(f"Quit with {', '.join(QUIT)}; begin a new conversation with {' or '.join(CLEAR)}.\n")
    while True:
        line = read(USER)
        if line is None or line.strip().lower() in QUIT:
            write("\n" if line is None else "")
            return
        if line.strip().lower() == HELP:
            write(
                f"{', '.join(QUIT)}: quit. {', '.join(CLEAR)}: begin a new conversation. Ctrl-C: stop an answer. Any "
                "other line is a message.\n"
            )
        elif line.strip().lower() in CLEAR:
            chat.clear()
            write("A new conversation.\n")
        elif line.strip():
            _answer(chat, line.strip(), write, thinking)


def _answer(chat: Chat, text: str, write: Callable[[str], None], thinking: Thinking) -> None:
    before = chat.left_out_turns
    splitter = ThoughtSplitter()

    def show(parts: Sequence[Part]) -> None:
        for part, is_thought in parts:
            if not is_thought or thinking == "shown":
                write(part)
            elif thinking == "dimmed":
                write(f"{DIM}{part}{PLAIN}")

    try:
        write(ANSWER)
        last = None
        for token in chat.say(text):
            if last is None:
                splitter.is_open = chat.opened_thoughts
            show(splitter.feed(token.text))
            last = token
        show(splitter.end())
        write("\n")
        if last is not None and last.finish_reason == "length":
            write("[The answer reached its limit and was cut off.]\n")
    except KeyboardInterrupt:
        write("\n[Interrupted.]\n")
    except AscendSpeedError as error:
        write(f"\n[{error}]\n")
    if chat.left_out_turns > before:
        write(
            f"[The conversation is longer than the model's context: its first {chat.left_out_turns} turns are left "
            "out.]\n"
        )
