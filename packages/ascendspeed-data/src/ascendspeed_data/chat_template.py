"""Chat templates: Jinja programs that come with a tokenizer and lay a conversation out.

A template that marks what the assistant generates (`{% generation %}`) is taken at its word. For others the rendering
up to an assistant's turn is compared with the one including it, as transformers' users do by hand.
"""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ascendspeed_data.errors import DataError
from ascendspeed_data.handlers.base import Part, Sample
from ascendspeed_data.tokenizer import Tokenizer

Message = dict[str, Any]
BEGIN, END = "\x02generation\x03", "\x02endgeneration\x03"
"""Stand around what `{% generation %}` marks while a text is rendered; texts that hold them are refused."""


class GenerationBlocks(Extension):
    """`{% generation %}...{% endgeneration %}`, as transformers defines it."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Any) -> nodes.Node:
        """Wrap the body into a call."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Callable[[], str]) -> str:
        return BEGIN + caller() + END


class ChatTemplate:
    """The template of one tokenizer.

    Args:
        source: the Jinja program.
        special_tokens: `bos_token`, `eos_token` ... as the program may ask for them.
        special_ids: special pieces and their ids; in the rendered text they become these ids.
        splits_text: whether special pieces must be cut out of the text because the tokenizer takes them for text.
    """

    def __init__(
        self, source: str, special_tokens: dict[str, str], special_ids: dict[str, int], splits_text: bool
    ) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        # No strftime_now: the day of tokenizing would get into the samples. Templates fall back to a fixed date.
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"the chat template is not valid: {error}") from None
        self._marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._special_tokens = special_tokens
        self._special_ids = special_ids
        longest_first = sorted(special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._splits_text = splits_text

    @classmethod
    def of(cls, tokenizer: Tokenizer, source: str | None = None) -> "ChatTemplate":
        """Return the template of a tokenizer, or another program with its special pieces.

        Raises:
            DataError: it has none, or one that is not valid.
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
        tokens = tuple((key, tokenizer.pieces([i])[0]) for key, i in named.items() if i is not None)
        return _compiled(
            source,
            tokens,
            tuple(tokenizer.special_ids.items()),
            tokenizer.kind == "sentencepiece",
        )

    def render(self, messages: list[Message], tools: Any = None, ask: bool = False) -> str:
        """Return the conversation as text, with the beginning of an answer at its end if `ask`.

        Raises:
            DataError: the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=messages, tools=tools, add_generation_prompt=ask, **self._special_tokens
            )
        except (TemplateError, TypeError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from None

    def sample(self, messages: list[Message], tools: Any = None, first_trained: int = 0) -> Sample:
        """Lay a conversation out; every assistant turn is trained, up to the special piece that ends it.

        Assistant turns before message `first_trained` are context.
        """
        make = self._marked if self._marks_generation else self._compared
        pieces = make(messages, tools, first_trained)
        parts: list[Part] = []
        for text, trained in pieces:
            parts += self._parts(text, trained)
        if not any(part.trained for part in parts):
            raise DataError("the conversation has no assistant turn, so there is nothing to learn")
        last = next(p for p in reversed(parts) if not str(p.content).isspace())
        if last.trained and not self._ends_special(last):
            parts.append(Part(None, True))
        return Sample(tuple(parts), surrounded=False)

    def prompt(self, messages: list[Message], tools: Any = None) -> Sample:
        """Lay a conversation out up to the beginning of an answer; nothing is trained."""
        text = self.render(messages, tools, ask=True).replace(BEGIN, "").replace(END, "")
        return Sample(tuple(self._parts(text, False)), surrounded=False)

    def end_of_turn(self) -> tuple[int, ...]:
        """Return the id of the special piece that ends an answer, if the template puts one there."""
        answer = "The answer."
        turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
        text = self.render(turns).replace(BEGIN, "").replace(END, "")
        found = self._special.match(text.rpartition(answer)[2].lstrip())
        return () if found is None else (self._special_ids[found[0]],)

    def _marked(self, messages: list[Message], tools: Any, first_trained: int) -> list[tuple[str, bool]]:
        text = self.render(messages, tools)
        context = self.render(messages[:first_trained], tools).count(BEGIN) if first_trained else 0
        pieces: list[tuple[str, bool]] = []
        for number, piece in enumerate(text.split(BEGIN)):
            inside, end, outside = piece.partition(END) if number else ("", "", piece)
            if number and not end:
                raise DataError("the conversation spells the mark of a generation block; remove it")
            pieces += [(inside, number > context), (outside, False)]
        return pieces

    def _compared(self, messages: list[Message], tools: Any, first_trained: int) -> list[tuple[str, bool]]:
        whole = self.render(messages, tools)
        pieces: list[tuple[str, bool]] = []
        done = 0
        for number, message in enumerate(messages):
            if message.get("role") != "assistant" or number < first_trained:
                continue
            before = self.render(messages[:number], tools, ask=True)
            after = self.render(messages[: number + 1], tools)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                before = self.render(messages[:number], tools)
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                raise DataError(
                    f"message {number + 1}: the chat template lays this turn out differently when others follow, so "
                    "what is to be learned cannot be told; mark it in the template with {% generation %}"
                )
            pieces += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
            done = len(after)
        return [*pieces, (whole[done:], False)]

    def _parts(self, text: str, trained: bool) -> list[Part]:
        """Cut special pieces out where the tokenizer does not, and white space after the last one from training."""
        kept, rest = text, ""
        if trained and self._at_end(text.rstrip()):
            kept = text.rstrip()
            rest = text[len(kept) :]
        parts = self._cut(kept, trained) if self._splits_text else [Part(kept, trained)]
        return [part for part in (*parts, Part(rest, False)) if part.content != ""]

    def _at_end(self, text: str) -> bool:
        return any(text.endswith(piece) for piece in self._special_ids)

    def _ends_special(self, part: Part) -> bool:
        return isinstance(part.content, int) or self._at_end(str(part.content).rstrip())

    def _cut(self, text: str, trained: bool) -> list[Part]:
        parts, start = [], 0
        for match in self._special.finditer(text):
            parts += [Part(text[start : match.start()], trained), Part(self._special_ids[match[0]], trained)]
            start = match.end()
        return [*parts, Part(text[start:], trained)]


@lru_cache(maxsize=4)
def _compiled(
    source: str, tokens: tuple[tuple[str, str], ...], special: tuple[tuple[str, int], ...], splits_text: bool
) -> ChatTemplate:
    return ChatTemplate(source, dict(tokens), dict(special), splits_text)


def _to_json(value: Any, indent: int | None = None, sort_keys: bool = False, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateError(message)
