"""Chat templates: Jinja templates of a tokenizer that format a conversation.

The loss covers what the assistant says. A template may mark that with `{% generation %}`; otherwise `answers` finds it.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, meta

from ascendspeed_data.answers import THOUGHTS_END, Answers, Ends
from ascendspeed_data.content_forms import ContentForms
from ascendspeed_data.conversation import Conversation, Message, conversation_of
from ascendspeed_data.errors import ConfigError, DataError
from ascendspeed_data.fields import REASONING, TEMPLATE_VARIABLES
from ascendspeed_data.message_keys import tracked, unread_keys
from ascendspeed_data.printed import PrintedParts
from ascendspeed_data.sample import Sample, Segment
from ascendspeed_data.template_environment import template_environment, without_marks
from ascendspeed_data.template_values import Reasoning, TemplateValues
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_data.tokenizer_config import DEFAULT, TOOL_USE

LEARNED_OPENERS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("[gMASK]", "<|observation|>", "<|assistant|>"), ("<|user|>", "<|observation|>", "<|system|>")),
)
"""Families whose answers end with the opener of the next turn: pieces by which to know the template, and the openers.

Of each the first follows an answer, the second follows calls. GLM-4.x: trl/chat_templates/glm4moe_training.jinja, and
`eos_token_id` of the models' generation_config.json.
"""


class ChatTemplate:
    """The template of one tokenizer.

    Args:
        source: the Jinja template.
        special_tokens: `bos_token`, `eos_token` ... for the template to use.
        special_ids: ids of the special tokens; the rendered text encodes to these ids.
        values: further values that each rendering gets.
    """

    def __init__(
        self,
        source: str,
        special_tokens: dict[str, str],
        special_ids: dict[str, int],
        values: TemplateValues | None = None,
    ) -> None:
        self._values = values or TemplateValues()
        environment = template_environment(self._values.strftime_now)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise DataError(f"the chat template is not valid: {error}") from None
        self._variables = variables_read_by(source)
        self._marks_generation = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._special_tokens = special_tokens
        self._special_ids = special_ids
        longest_first = sorted(special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        openers = next((ends for pieces, ends in LEARNED_OPENERS if all(one in source for one in pieces)), ())
        self._found_ends: Ends | None = None
        self._openers = tuple(one for one in openers if one in special_ids)
        self._forms = ContentForms(self._render)
        self._printed = PrintedParts(self._render)

    @classmethod
    def for_conversation(cls, tokenizer: Tokenizer, conversation: Conversation) -> "ChatTemplate":
        """Return the template of a tokenizer that fits a conversation: with or without tools."""
        return cls.from_tokenizer(tokenizer, has_tools="tools" in conversation.variables)

    @classmethod
    def from_tokenizer(
        cls,
        tokenizer: Tokenizer,
        source: str | None = None,
        has_tools: bool = False,
        values: TemplateValues | None = None,
    ) -> "ChatTemplate":
        """Return the template of a tokenizer, or `source` with the special tokens of the tokenizer.

        `values` take the place of the tokenizer's.

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
        return _compiled(
            source,
            tokens,
            tuple({**tokenizer.special_ids, **in_source}.items()),
            values or tokenizer.template_values,
        )

    def samples(self, conversation: Conversation) -> list[Sample]:
        """Format a conversation, with loss on every assistant message to learn and on what ends it.

        There are several samples where the template shows earlier answers differently once others follow.

        Raises:
            DataError: the template does not support the conversation, or leaves out a part of it that says something;
                or there is nothing to learn.
        """
        conversation, dropped = with_reasoning(conversation, self._values.reasoning)
        fitted = self._forms.fit(conversation.messages)

        def render(count: int, add_generation_prompt: bool, num_without_thoughts: int) -> str:
            bare = [_without_thoughts(message) for message in fitted[:num_without_thoughts]]
            messages = [*bare, *fitted[len(bare) : count]]
            return self._render(messages, conversation.variables, add_generation_prompt)

        self._check_variables(conversation)
        answers = Answers(conversation, render, self._ends(), self._marks_generation)
        answered = answers.samples(render(len(fitted), False, 0))
        if self._values.reasoning == "last":
            answered = answered[-1:]
        made = []
        for number, one in enumerate(answered):
            elsewhere = {index for other in answered if other is not one for index in other.learned}
            if self._values.reasoning == "last":
                elsewhere = set(range(one.num_messages)) - set(one.learned)
            unused = self._check(fitted[: one.num_messages], conversation, False, elsewhere)
            segments = self._sample_segments(one.parts)
            if not any(segment.trained for segment in segments):
                raise DataError(
                    "the conversation has no assistant message to learn, so there is nothing to learn"
                )
            reason = one.reason if number < len(answered) - 1 else ""
            made.append(
                Sample(
                    tuple(segments),
                    add_special_tokens=False,
                    is_rendered=True,
                    unused=tuple(dict.fromkeys((*dropped, *unused))),
                    reason=reason,
                    has_other_prompt=one.has_other_prompt,
                )
            )
        return made

    def sample(self, conversation: Conversation) -> Sample:
        """Format a conversation as one sample, as `samples` does.

        Raises:
            DataError: it becomes several, or as `samples` says.
        """
        made = self.samples(conversation)
        if len(made) > 1:
            raise DataError(
                f"{made[0].reason}, so the answers to learn do not stand in one sample; give weight 0 to all but the "
                "last, or use another chat template"
            )
        return made[0]

    def prompt(
        self, messages: Sequence[Message], tools: Any = None, variables: Mapping[str, Any] | None = None
    ) -> Sample:
        """Format a conversation up to the start of an answer, without loss.

        Args:
            messages: of the conversation.
            tools: that may be called.
            variables: of the template; they come before those of the tokenizer.

        Raises:
            DataError: the template does not support the conversation, or leaves out a part of it that says something.
        """
        columns = {"tools": tools} | ({"chat_template_kwargs": dict(variables)} if variables else {})
        conversation = conversation_of(messages, columns)
        self._check_variables(conversation)
        fitted = self._forms.fit(conversation.messages)
        text = self._render(fitted, conversation.variables, add_generation_prompt=True)
        unused = self._check(fitted, conversation, True, range(len(fitted)))
        segments = self._segments(without_marks(text), False)
        return Sample(tuple(segments), add_special_tokens=False, is_rendered=True, unused=unused)

    def _render(
        self, messages: Sequence[Message], variables: Mapping[str, Any], add_generation_prompt: bool = False
    ) -> str:
        """Return messages as text; `add_generation_prompt` adds the start of an assistant message."""
        given = {
            "tools": None, "documents": None, **self._values.kwargs, **variables, **self._special_tokens,
        }  # fmt: skip
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **given
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            hint = "; give --chat-template-date" if "strftime_now" in str(error) else ""
            raise DataError(f"the chat template does not support the conversation: {error}{hint}") from None

    def _check_variables(self, conversation: Conversation) -> None:
        for name in conversation.variables:
            if name not in self._variables:
                raise DataError(
                    f"column {name!r}: {TEMPLATE_VARIABLES.reason}; {TEMPLATE_VARIABLES.remedy}"
                    if name in TEMPLATE_VARIABLES.names
                    else f"column 'chat_template_kwargs' sets {name!r}, which the template does not read; remove it"
                )

    def _check(
        self,
        fitted: Sequence[Message],
        conversation: Conversation,
        add_generation_prompt: bool,
        elsewhere: Collection[int],
    ) -> tuple[str, ...]:
        """Check that the template reads and prints what says something, and return the keys without effect.

        Args:
            fitted: messages as the template gets them.
            conversation: that they are of.
            add_generation_prompt: whether the rendering ends with the start of an answer.
            elsewhere: numbers from 0 of messages whose thoughts need not be printed here.
        """
        variables = conversation.variables
        messages = [tracked(message) for message in fitted]
        text = self._render(messages, variables, add_generation_prompt)
        unused = dict.fromkeys(conversation.unused)
        for number, message in enumerate(messages):
            try:
                unused |= dict.fromkeys(unread_keys(message, number in elsewhere))
            except DataError as error:
                raise DataError(f"message {number + 1}: {error}") from None
        left_out = self._printed.check(fitted, variables, text, add_generation_prompt, elsewhere)
        return tuple(unused | dict.fromkeys(left_out))

    def end_of_turn(self) -> tuple[int, ...]:
        """Return the ids of the special tokens that end an answer or calls, if the template has them."""
        found = self._special.match(self._after_answer().lstrip())
        ends = [] if found is None else [found[0]]
        # Where the next turn's opener ends answers, what stands after one call may stand before another.
        calls = [] if self._openers else self._end_of_calls()
        return tuple(dict.fromkeys(self._special_ids[piece] for piece in (*ends, *calls, *self._openers)))

    def _ends(self) -> Ends:
        """Return what ends an answer, found out by trial."""
        if self._found_ends is None:
            ends = Ends(self._special, self._openers)
            try:
                trailer = ends.trailer_in(self._after_answer(), self._after_answer(is_followed=True))
            except DataError:
                trailer = ""
            self._found_ends = replace(ends, trailer=trailer)
        return self._found_ends

    def _after_answer(self, is_followed: bool = False) -> str:
        """Return what the template prints after an answer."""
        answer = "zq7 answer"
        turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
        if is_followed:
            turns.append({"role": "user", "content": "Another."})
        text = without_marks(self._render(self._forms.fit(turns), {}))
        return text.rpartition(answer)[2] if answer in text else ""

    def _end_of_calls(self) -> list[str]:
        """Return the special token at the end of an answer that calls a tool, if the template prints calls."""
        call = {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "probed", "arguments": {"a": "b"}},
        }
        turns: list[Message] = [
            {"role": "user", "content": "A question."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        try:
            text = without_marks(self._render(self._forms.fit(conversation_of(turns).messages), {})).rstrip()
        except DataError:
            return []
        found = [one for one in self._special.finditer(text) if one.end() == len(text)]
        return [one[0] for one in found if "probed" in text]

    def _sample_segments(self, parts: Sequence[tuple[str, bool]]) -> list[Segment]:
        segments: list[Segment] = []
        for text, trained in parts:
            segments += self._segments(text, trained)
        last = next((p for p in reversed(segments) if not str(p.content).isspace()), None)
        if last is not None and last.trained and not self._is_special_end(last):
            segments.append(Segment(None, True))
        return segments

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


@lru_cache(maxsize=8)
def _compiled(
    source: str,
    tokens: tuple[tuple[str, str], ...],
    special: tuple[tuple[str, int], ...],
    values: TemplateValues,
) -> ChatTemplate:
    return ChatTemplate(source, dict(tokens), dict(special), values)


def variables_read_by(source: str) -> set[str]:
    """Return the variables that a chat template reads.

    Raises:
        DataError: the template is not valid.
    """
    try:
        return meta.find_undeclared_variables(template_environment(None).parse(source))
    except TemplateError as error:
        raise DataError(f"the chat template is not valid: {error}") from None


def with_reasoning(conversation: Conversation, reasoning: Reasoning) -> tuple[Conversation, list[str]]:
    """Return a conversation with the thoughts that are wanted, and what to count if some were taken off.

    Thoughts are `reasoning_content` and its other names, and what stands before `</think>` in an answer.
    """
    if reasoning == "keep":
        return conversation, []
    messages = conversation.messages
    last_question = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
    end = len(messages) if reasoning == "drop" else last_question
    kept = [
        _without_thoughts(message) if number < end and message["role"] == "assistant" else message
        for number, message in enumerate(messages)
    ]
    dropped = [f"thoughts (--reasoning {reasoning})"] if kept != messages else []
    return replace(conversation, messages=kept), dropped


def _without_thoughts(message: Message) -> Message:
    made = {name: value for name, value in message.items() if name not in REASONING}
    content = made.get("content")
    if isinstance(content, str) and THOUGHTS_END in content:
        made["content"] = content.rpartition(THOUGHTS_END)[2].lstrip("\n")
    return made
