"""Chat templates: Jinja templates of a tokenizer that format a conversation.

The loss covers what the assistant says. A template may mark that with `{% generation %}`. For other templates,
rendering a conversation with and without an assistant message shows which text the message adds.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ascendspeed_data.content_forms import ContentForms
from ascendspeed_data.conversation import Conversation, Message, conversation_of
from ascendspeed_data.errors import ConfigError, DataError
from ascendspeed_data.fields import (
    MESSAGE_CONTENT,
    REASONING,
    TEMPLATE_VARIABLES,
    check_unlisted,
    field_of,
    filled,
    message_key,
)
from ascendspeed_data.printed import PrintedParts
from ascendspeed_data.sample import Sample, Segment
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_data.tokenizer_config import DEFAULT, TOOL_USE
from ascendspeed_data.tracking import TrackedObject, unread_of

GENERATION_BEGIN, GENERATION_END = "\x02generation\x03", "\x02endgeneration\x03"
"""Delimiters of `{% generation %}` blocks in rendered text; conversations must not contain them."""


NAMES_OF_ASSISTANT = ("gpt", "chatgpt", "bot", "chatbot", "model", "ai", "bing", "bard")
"""Roles that other programs give the assistant; templates that mark no answers do not say that these are answers."""


class GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}`, as transformers defines it."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Any) -> nodes.Node:
        """Wrap the body in a call that adds the delimiters."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return GENERATION_BEGIN + caller() + GENERATION_END


def _without_marks(text: str) -> str:
    return text.replace(GENERATION_BEGIN, "").replace(GENERATION_END, "")


class ChatTemplate:
    """The template of one tokenizer.

    Args:
        source: the Jinja template.
        special_tokens: `bos_token`, `eos_token` ... for the template to use.
        special_ids: ids of the special tokens; the rendered text encodes to these ids.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], special_ids: dict[str, int]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlocks, loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        # No strftime_now: samples would depend on the date of preprocessing. Templates fall back to a fixed date.
        try:
            self._template = environment.from_string(source)
            self._variables = meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise DataError(f"the chat template is not valid: {error}") from None
        self._marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._special_tokens = special_tokens
        self._special_ids = special_ids
        longest_first = sorted(special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._forms = ContentForms(self._render)
        self._printed = PrintedParts(self._render)

    @classmethod
    def for_conversation(cls, tokenizer: Tokenizer, conversation: Conversation) -> "ChatTemplate":
        """Return the template of a tokenizer that fits a conversation: with or without tools."""
        return cls.from_tokenizer(tokenizer, has_tools="tools" in conversation.variables)

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Tokenizer, source: str | None = None, has_tools: bool = False
    ) -> "ChatTemplate":
        """Return the template of a tokenizer, or `source` with the special tokens of the tokenizer.

        Of several templates it is `tool_use` for a conversation with tools, otherwise `default`, as in transformers.

        Raises:
            DataError: the tokenizer has no template, or the template is not valid.
        """
        named = tokenizer.named_chat_templates
        if source is None:
            source = named.get(TOOL_USE, tokenizer.chat_template) if has_tools else tokenizer.chat_template
        if source is None and named:
            raise DataError(
                f"tokenizer {tokenizer.path} has the chat templates {', '.join(sorted(named))}, none of which is the "
                "default; give --chat-template with one of these names"
            )
        if source is None:
            raise DataError(
                f"tokenizer {tokenizer.path} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); give --chat-template FILE"
            )
        ids = {
            "bos_token": tokenizer.bos_id,
            "eos_token": tokenizer.eos_id,
            "unk_token": tokenizer.unk_id,
            "pad_token": tokenizer.pad_id,
        }
        tokens = tuple(
            (key, tokenizer.convert_ids_to_tokens([i])[0]) for key, i in ids.items() if i is not None
        )
        # A token may end a turn without being special; one that only a message contains does not.
        in_source = {token: number for token, number in tokenizer.added_ids.items() if token in source}
        return _compiled(source, tokens, tuple({**tokenizer.special_ids, **in_source}.items()))

    def sample(self, conversation: Conversation) -> Sample:
        """Format a conversation, with loss on every assistant message to learn and the special token that ends it.

        Raises:
            DataError: the template does not support the conversation, or leaves out a part of it that says something;
                or there is nothing to learn.
        """
        messages, whole, unused = self._whole(conversation, add_generation_prompt=False)
        split = self._split_at_marks if self._marks_generation else self._split_by_comparing
        segments: list[Segment] = []
        for text, trained in split(messages, whole, conversation):
            segments += self._segments(text, trained)
        if not any(segment.trained for segment in segments):
            raise DataError(
                "the conversation has no assistant message to learn, so there is nothing to learn"
            )
        last = next(p for p in reversed(segments) if not str(p.content).isspace())
        if last.trained and not self._is_special_end(last):
            segments.append(Segment(None, True))
        return Sample(tuple(segments), add_special_tokens=False, is_rendered=True, unused=unused)

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> Sample:
        """Format a conversation up to the start of an answer, without loss.

        Raises:
            DataError: the template does not support the conversation, or leaves out a part of it that says something.
        """
        conversation = conversation_of(messages, {"tools": tools})
        _, text, _ = self._whole(conversation, add_generation_prompt=True)
        segments = self._segments(_without_marks(text), False)
        return Sample(tuple(segments), add_special_tokens=False, is_rendered=True)

    def _render(
        self, messages: Sequence[Message], variables: Mapping[str, Any], add_generation_prompt: bool = False
    ) -> str:
        """Return messages as text; `add_generation_prompt` adds the start of an assistant message."""
        given = {"tools": None, "documents": None, **variables, **self._special_tokens}
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **given
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise DataError(f"the chat template does not support the conversation: {error}") from None

    def _whole(
        self, conversation: Conversation, add_generation_prompt: bool
    ) -> tuple[list[TrackedObject], str, tuple[str, ...]]:
        """Render a conversation, and check that the template reads and prints what says something.

        Returns:
            The messages as the template gets them, the text, and the keys without effect.
        """
        for name in conversation.variables:
            if name not in self._variables:
                raise DataError(
                    f"column {name!r}: {TEMPLATE_VARIABLES.reason}; {TEMPLATE_VARIABLES.remedy}"
                    if name in TEMPLATE_VARIABLES.names
                    else f"column 'chat_template_kwargs' sets {name!r}, which the template does not read; remove it"
                )
        fitted = self._forms.fit(conversation.messages)
        messages = [_tracked(message) for message in fitted]
        text = self._render(messages, conversation.variables, add_generation_prompt)
        unused = dict.fromkeys(conversation.unused)
        for number, message in enumerate(messages, 1):
            try:
                unused |= dict.fromkeys(_unread_keys(message))
            except DataError as error:
                raise DataError(f"message {number}: {error}") from None
        left_out = self._printed.check(fitted, conversation.variables, text, add_generation_prompt)
        return messages, text, tuple(unused | dict.fromkeys(left_out))

    def end_of_turn(self) -> tuple[int, ...]:
        """Return the id of the special token that ends an answer, if the template has one."""
        answer = "The answer."
        turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
        text = _without_marks(self._render(self._forms.fit(turns), {}))
        found = self._special.match(text.rpartition(answer)[2].lstrip())
        return () if found is None else (self._special_ids[found[0]],)

    def _split_at_marks(
        self, messages: Sequence[Message], whole: str, conversation: Conversation
    ) -> list[tuple[str, bool]]:
        blocks = whole.split(GENERATION_BEGIN)
        learned = self._learned_blocks(messages, conversation, len(blocks) - 1)
        parts: list[tuple[str, bool]] = [(blocks[0], False)]
        for block, is_learned in zip(blocks[1:], learned, strict=True):
            inside, end, outside = block.partition(GENERATION_END)
            if not end:
                raise DataError("the conversation contains the delimiter of a generation block; remove it")
            parts += [(inside, is_learned), (outside, False)]
        return parts

    def _learned_blocks(
        self, messages: Sequence[Message], conversation: Conversation, num_blocks: int
    ) -> list[bool]:
        """Return whether each generation block belongs to a message that is learned.

        Rendering the messages up to one whose mask differs from the next one's shows how many blocks belong to them.
        """
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        flags: list[bool] = []
        for number, following in zip(answers, [*answers[1:], None], strict=True):
            learned = conversation.learned[number]
            if following is None:
                end = num_blocks
            elif conversation.learned[following] == learned:
                continue
            else:
                end = self._render(messages[:following], conversation.variables).count(GENERATION_BEGIN)
            if not len(flags) <= end <= num_blocks:
                raise DataError(
                    f"message {number + 1}: the chat template marks another number of answers if others follow, so "
                    "those to learn are unknown; give all answers the same weight"
                )
            flags += [learned] * (end - len(flags))
        return flags or [True] * num_blocks

    def _split_by_comparing(
        self, messages: Sequence[Message], whole: str, conversation: Conversation
    ) -> list[tuple[str, bool]]:
        variables = conversation.variables
        parts: list[tuple[str, bool]] = []
        done = 0
        for number, message in enumerate(messages):
            role = str(message["role"])
            if role.lower() in (*NAMES_OF_ASSISTANT, "assistant") and role != "assistant":
                raise DataError(
                    f"message {number + 1}: an answer of the role {role!r} would not be learned; name the "
                    "role 'assistant'"
                )
            if role != "assistant" or not conversation.learned[number]:
                continue
            before = self._render(messages[:number], variables, add_generation_prompt=True)
            after = self._render(messages[: number + 1], variables)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                before = self._render(messages[:number], variables)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                raise DataError(
                    f"message {number + 1}: the chat template renders this message differently if others follow, so "
                    "the text to learn is unknown; mark it in the template with {% generation %}"
                )
            parts += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
        return [*parts, (whole[done:], False)]

    def _segments(self, text: str, trained: bool) -> list[Segment]:
        """Return a text as segments; white space after a special token that ends it has no loss."""
        kept, rest = text, ""
        if trained and self._ends_with_special(text.rstrip()):
            kept = text.rstrip()
            rest = text[len(kept) :]
        return [
            segment for segment in (Segment(kept, trained), Segment(rest, False)) if segment.content != ""
        ]

    def _ends_with_special(self, text: str) -> bool:
        return any(text.endswith(token) for token in self._special_ids)

    def _is_special_end(self, segment: Segment) -> bool:
        return self._ends_with_special(str(segment.content).rstrip())


def chat_template_named(name: str, tokenizer: Tokenizer) -> str | None:
    """Return the template of a file, or the tokenizer's template with this name; `None` if there is neither.

    Raises:
        ConfigError: there are both.
        DataError: the file cannot be read.
    """
    named = dict(tokenizer.named_chat_templates)
    if tokenizer.chat_template is not None:
        named[DEFAULT] = tokenizer.chat_template
    if not Path(name).is_file():
        return named.get(name)
    if name in named:
        raise ConfigError(
            f"chat_template={name} is a file and one of the tokenizer's templates; write the path of the file in full, "
            "or run the command in another folder"
        )
    return read_chat_template(Path(name))


def read_chat_template(path: Path) -> str:
    """Return the text of a template file.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"chat_template={path} cannot be read: {error}") from None


@lru_cache(maxsize=4)
def _compiled(
    source: str, tokens: tuple[tuple[str, str], ...], special: tuple[tuple[str, int], ...]
) -> ChatTemplate:
    return ChatTemplate(source, dict(tokens), dict(special))


def _tracked(message: Message) -> TrackedObject:
    """Return a message that notes which keys the template reads, also in its tool calls."""
    made = dict(message)
    if "tool_calls" in made:
        made["tool_calls"] = [
            TrackedObject(
                {**call, "function": TrackedObject(call["function"])} if "function" in call else call
            )
            for call in made["tool_calls"]
        ]
    return TrackedObject(made)


def _unread_keys(message: TrackedObject) -> list[str]:
    """Return the keys without effect of a message that was rendered.

    Raises:
        DataError: a key that says something was not read.
    """
    unread = unread_of(message)
    role = dict.get(message, "role")
    counted = []
    for name, value in unread.items():
        if name == "role" or not filled(value) or (value is False and field_of(name, "message") is not None):
            continue
        if name in REASONING and any(other in message and other not in unread for other in REASONING):
            continue
        if name == "content" and any(
            n not in unread for n in ("tool_calls", "function_call") if n in message
        ):
            text = value if isinstance(value, str) else "".join(part["text"] for part in value)
            if not text.strip():
                continue
        if field_of(name, "message") is None:
            check_unlisted(name, value, "message", str(role))
        if field_of(name, "message") is None or (name == "name" and role in ("tool", "function")):
            counted.append(message_key(name))
        else:
            shown = (
                " or ".join(repr(n) for n in REASONING if n in message) if name in REASONING else repr(name)
            )
            raise DataError(
                f"key {shown} (role {role!r}): {MESSAGE_CONTENT.reason}; {MESSAGE_CONTENT.remedy}"
            )
    if "tool_calls" not in unread:
        for number, call in enumerate(dict.get(message, "tool_calls") or (), 1):
            inner = dict.get(call, "function")
            for named in (call, inner) if isinstance(inner, TrackedObject) else (call,):
                for name in ("function", "name", "arguments"):
                    if filled(unread_of(named).get(name)):
                        raise DataError(f"tool_calls[{number}]: key {name!r}: {MESSAGE_CONTENT.reason}")
    return counted


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON text; the arguments are those of transformers."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
