"""Chat templates: Jinja templates of a tokenizer that format a conversation.

The loss covers what the assistant says. A template may mark that with `{% generation %}`. For other templates,
rendering a conversation with and without an assistant message shows which text the message adds.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ascendspeed_data.errors import DataError
from ascendspeed_data.sample import Sample, Segment
from ascendspeed_data.tokenizer import Tokenizer

Message = dict[str, Any]
GENERATION_BEGIN, GENERATION_END = "\x02generation\x03", "\x02endgeneration\x03"
"""Delimiters of `{% generation %}` blocks in rendered text; conversations must not contain them."""


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
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        # No strftime_now: samples would depend on the date of preprocessing. Templates fall back to a fixed date.
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"the chat template is not valid: {error}") from None
        self._marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._special_tokens = special_tokens
        self._special_ids = special_ids
        longest_first = sorted(special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, source: str | None = None) -> "ChatTemplate":
        """Return the template of a tokenizer, or `source` with the special tokens of the tokenizer.

        Raises:
            DataError: the tokenizer has no template, or the template is not valid.
        """
        source = tokenizer.chat_template if source is None else source
        if source is None:
            raise DataError(
                f"tokenizer {tokenizer.path} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json); give --chat-template FILE"
            )
        named = {
            "bos_token": tokenizer.bos_id,
            "eos_token": tokenizer.eos_id,
            "unk_token": tokenizer.unk_id,
            "pad_token": tokenizer.pad_id,
        }
        tokens = tuple(
            (key, tokenizer.convert_ids_to_tokens([i])[0]) for key, i in named.items() if i is not None
        )
        # A token may end a turn without being special; one that only a message contains does not.
        in_source = {token: number for token, number in tokenizer.added_ids.items() if token in source}
        return _compiled(source, tokens, tuple({**tokenizer.special_ids, **in_source}.items()))

    def render(self, messages: list[Message], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """Return the conversation as text; `add_generation_prompt` adds the start of an assistant message.

        Raises:
            DataError: the template does not support the conversation.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template does not support the conversation: {error}") from None

    def sample(self, messages: list[Message], tools: Any = None, first_trained: int = 0) -> Sample:
        """Format a conversation, with loss on every assistant message and the special token that ends it.

        Assistant messages before message `first_trained` are context without loss.
        """
        split = self._split_at_marks if self._marks_generation else self._split_by_comparing
        segments: list[Segment] = []
        for text, trained in split(messages, tools, first_trained):
            segments += self._segments(text, trained)
        if not any(segment.trained for segment in segments):
            raise DataError("the conversation has no assistant message, so there is nothing to learn")
        last = next(p for p in reversed(segments) if not str(p.content).isspace())
        if last.trained and not self._is_special_end(last):
            segments.append(Segment(None, True))
        return Sample(tuple(segments), add_special_tokens=False, is_rendered=True)

    def prompt(self, messages: list[Message], tools: Any = None) -> Sample:
        """Format a conversation up to the start of an answer, without loss."""
        text = _without_marks(self.render(messages, tools, add_generation_prompt=True))
        return Sample(tuple(self._segments(text, False)), add_special_tokens=False, is_rendered=True)

    def end_of_turn(self) -> tuple[int, ...]:
        """Return the id of the special token that ends an answer, if the template has one."""
        answer = "The answer."
        turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
        text = _without_marks(self.render(turns))
        found = self._special.match(text.rpartition(answer)[2].lstrip())
        return () if found is None else (self._special_ids[found[0]],)

    def _split_at_marks(
        self, messages: list[Message], tools: Any, first_trained: int
    ) -> list[tuple[str, bool]]:
        text = self.render(messages, tools)
        context = self.render(messages[:first_trained], tools).count(GENERATION_BEGIN) if first_trained else 0
        parts: list[tuple[str, bool]] = []
        for number, block in enumerate(text.split(GENERATION_BEGIN)):
            inside, end, outside = block.partition(GENERATION_END) if number else ("", "", block)
            if number and not end:
                raise DataError("the conversation contains the delimiter of a generation block; remove it")
            parts += [(inside, number > context), (outside, False)]
        return parts

    def _split_by_comparing(
        self, messages: list[Message], tools: Any, first_trained: int
    ) -> list[tuple[str, bool]]:
        whole = self.render(messages, tools)
        parts: list[tuple[str, bool]] = []
        done = 0
        for number, message in enumerate(messages):
            if message.get("role") != "assistant" or number < first_trained:
                continue
            before = self.render(messages[:number], tools, add_generation_prompt=True)
            after = self.render(messages[: number + 1], tools)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                before = self.render(messages[:number], tools)
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


def _to_json(value: Any, indent: int | None = None, sort_keys: bool = False, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
