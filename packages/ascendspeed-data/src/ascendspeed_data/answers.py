"""Find the answers in a rendered conversation: the text that the model must produce after the prompt that it gets.

The prompt of an answer is the rendering of the messages before it, with the start of an answer
(`add_generation_prompt`). What the rendering up to the answer has after that prompt is to be learned, with the piece
that ends the turn. A conversation is one sample where the whole rendering shows each prompt and answer just so. Where
a template renders earlier turns differently once others follow (Qwen3 drops earlier thoughts), the answer is learned
in a sample of its own, which ends with it.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ascendspeed_data.conversation import Conversation
from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import REASONING
from ascendspeed_data.template_environment import GENERATION_BEGIN, GENERATION_END, without_marks

THOUGHTS_BEGIN, THOUGHTS_END = "<think>", "</think>"
"""Around the thoughts that stand before an answer in its content."""

DROPS_THOUGHTS = "the chat template leaves out thoughts of earlier turns"
RENDERS_ANEW = "the chat template renders an earlier answer differently once others follow"
ENDS_WITH_NOTHING = "the chat template has no piece that ends an answer, so each has the end-of-sequence id"
"""Why a conversation becomes several samples."""

NAMES_OF_ASSISTANT = ("gpt", "chatgpt", "bot", "chatbot", "model", "ai", "bing", "bard")
"""Roles that other programs give the assistant; templates that mark no answers do not say that these are answers."""

Render = Callable[[int, bool, int], str]
"""Renders the first messages of a conversation, with the start of an answer if asked to.

The third argument is the number of messages, from the first on, that lose their thoughts.
"""

Part = tuple[str, bool]
"""A text, and whether it is learned."""


@dataclass(frozen=True)
class AnsweredSample:
    """A sample of a conversation.

    Attributes:
        num_messages: the sample is the rendering of this number of messages.
        parts: the rendering.
        learned: numbers from 0 of the messages that are learned in it.
        reason: why it is not part of the next sample; empty for the last one.
        has_other_prompt: whether the start that a server gives one of the answers says more than the sample shows.
    """

    num_messages: int
    parts: list[Part]
    learned: tuple[int, ...]
    reason: str = ""
    has_other_prompt: bool = False


@dataclass(frozen=True)
class Ends:
    """What ends an answer in one template.

    Attributes:
        special: matches a special piece.
        openers: special pieces that open the next turn and end the answer by that; most templates have none.
        trailer: what follows the end of an answer only if no message follows, such as the `<|endoftext|>` of Phi-3.
    """

    special: re.Pattern[str]
    openers: tuple[str, ...] = ()
    trailer: str = ""

    def ended(self, text: str) -> bool:
        """Return whether a text ends with a special piece, white space aside."""
        text = text.rstrip()
        return any(one.end() == len(text) for one in self.special.finditer(text))

    def pieces(self, text: str) -> list[str]:
        """Return a text cut before and after each special piece."""
        edges = [0, *(edge for one in self.special.finditer(text) for edge in one.span()), len(text)]
        return [text[begin:end] for begin, end in pairwise(edges) if end > begin]

    def trailer_in(self, last: str, followed: str) -> str:
        """Return what the rendering of a last answer has after the end that an answer with followers has too.

        Args:
            last: what follows the last answer of a conversation.
            followed: what follows the answer if a message follows.
        """
        shared = 0
        for one, other in zip(self.pieces(last), self.pieces(followed), strict=False):
            if one != other:
                break
            shared += len(one)
        return last[shared:] if self.ended(last[:shared]) and self.ended(last) else ""

    def opener_at(self, text: str, position: int) -> str:
        """Return the opener that stands at a position of a text, or an empty one."""
        return next((one for one in self.openers if text.startswith(one, position)), "")


@dataclass
class _Turn:
    """An answer as serving shows it.

    Attributes:
        number: of the message, from 0.
        prompt: the rendering before it.
        answer: what follows, without white space after its end.
        trailer: what follows only if no message does.
        is_apart: whether no rendering has the answer after this prompt, because what comes after drops thoughts of it.
        has_other_prompt: whether a server gives another prompt, or one whose last token is another.
    """

    number: int
    prompt: str
    answer: str
    trailer: str = ""
    is_apart: bool = False
    has_other_prompt: bool = False

    def is_in(self, text: str) -> bool:
        """Return whether a rendering shows the answer after its prompt, as serving does."""
        return text.startswith(self.prompt) and text.startswith(self.answer, len(self.prompt))

    def end_in(self, text: str) -> int:
        """Return where the answer ends in a rendering that has it."""
        end = len(self.prompt) + len(self.answer)
        return end + len(self.trailer) if text[end:].rstrip() == self.trailer.rstrip() else end


class Answers:
    """The answers of one conversation.

    Args:
        conversation: with its masks.
        render: renders its first messages.
        ends: what ends an answer.
        is_marked: whether the template marks answers with `{% generation %}`.
    """

    def __init__(self, conversation: Conversation, render: Render, ends: Ends, is_marked: bool) -> None:
        self._conversation, self._ends, self._is_marked = conversation, ends, is_marked
        self._render_marked = render
        self._rendered: dict[tuple[int, bool], str] = {}
        self._turns: dict[int, _Turn] = {}

    def samples(self, whole: str) -> list[AnsweredSample]:
        """Return the samples in the order of their last messages.

        Args:
            whole: the rendering of all messages, with marks.

        Raises:
            DataError: the template shows an answer without the prompt that asks for it, so what is to be learned is
                unknown.
        """
        messages = self._conversation.messages
        self._rendered[len(messages), False] = whole
        left = [number for number, message in enumerate(messages) if self._is_learned(number, message)]
        if not left:
            # A template may mark texts that are not in messages of the assistant.
            return [AnsweredSample(len(messages), self._parts(len(messages), []), ())]
        made: list[AnsweredSample] = []
        reason = ""
        count = len(messages)
        while left:
            text = without_marks(self._render(count))
            shown, hidden = self._shown_in(text, left)
            if left[-1] not in shown and count > left[-1] + 1:
                count = left[-1] + 1
                reason = reason or self._reason(self._turn(left[-1]), text)
                continue
            if left[-1] in shown:
                differs = any(self._turn(number).has_other_prompt for number in shown)
                made.append(AnsweredSample(count, self._parts(count, shown), tuple(shown), reason, differs))
                left = hidden
            else:
                made.append(self._apart(self._turn(left.pop()), reason))
            if left:
                reason = self._reason(self._turn(left[-1]), text)
                count = left[-1] + 1
        return made[::-1]

    def _apart(self, turn: _Turn, reason: str) -> AnsweredSample:
        """Return the sample of an answer that stands in no rendering after the prompt that asks for it."""
        if not turn.is_apart:
            raise self._unknown(turn.number)
        parts = [(turn.prompt, False), (turn.answer + turn.trailer, True)]
        return AnsweredSample(turn.number + 1, parts, (turn.number,), reason)

    def _unknown(self, number: int) -> DataError:
        return DataError(
            f"message {number + 1}: the chat template renders what comes before this answer differently once the "
            "answer follows, so the text to learn is unknown; mark it in the template with {% generation %}"
        )

    def _is_learned(self, number: int, message: Any) -> bool:
        role = str(message["role"])
        if not self._is_marked and role.lower() in (*NAMES_OF_ASSISTANT, "assistant") and role != "assistant":
            raise DataError(
                f"message {number + 1}: an answer of the role {role!r} would not be learned; name the role 'assistant'"
            )
        return role == "assistant" and self._conversation.learned[number]

    def _render(self, count: int, add_generation_prompt: bool = False) -> str:
        key = (count, add_generation_prompt)
        if key not in self._rendered:
            self._rendered[key] = self._render_marked(count, add_generation_prompt, 0)
        return self._rendered[key]

    def _bare(self, count: int, add_generation_prompt: bool = False) -> str:
        return without_marks(self._render(count, add_generation_prompt))

    def _turn(self, number: int) -> _Turn:
        """Return an answer as serving shows it."""
        if number not in self._turns:
            upto = self._bare(number + 1)
            prompt = self._prompt(number)
            asked = prompt
            is_apart = not upto.startswith(prompt) and self._answer_apart(number) is not None
            if is_apart:
                upto = prompt + (self._answer_apart(number) or "")
            elif not upto.startswith(prompt):
                # The start of the answer says more than the answer itself, as `<think>` of DeepSeek-R1's template
                # before an answer without thoughts: the opener that both have is the prompt.
                prompt = self._shared_opener(number, prompt, upto)
            answer = upto[len(prompt) :]
            trailer = self._ends.trailer
            if trailer and answer.endswith(trailer):
                whole, answer = answer, answer.removesuffix(trailer).rstrip()
                trailer = whole[len(answer) :].rstrip()
            else:
                trailer = ""
            answer = answer.rstrip() if self._ends.ended(answer) else answer
            # White space before and after the border may be one token: thoughts that are opened, and closed at once.
            is_closed = prompt.endswith(f"{THOUGHTS_BEGIN}\n") and answer.startswith(f"\n{THOUGHTS_END}")
            differs = not self._is_marked and (is_closed or prompt != asked)
            self._turns[number] = _Turn(number, prompt, answer, trailer, is_apart, differs)
        return self._turns[number]

    def _prompt(self, number: int) -> str:
        """Return the rendering before an answer; marks need none, so a template with them may refuse to give it."""
        try:
            return self._bare(number, True)
        except DataError:
            if self._is_marked:
                return ""
            raise

    def _answer_apart(self, number: int) -> str | None:
        """Return an answer before which the template drops thoughts that its prompt has; `None` if it is none.

        So does the template of gpt-oss with the thoughts before a tool call, once the last answer follows.
        """
        if self._is_marked:
            return None
        prompt = without_marks(self._render_marked(number, True, number))
        upto = without_marks(self._render_marked(number + 1, False, number))
        is_same = upto == self._bare(number + 1) and upto.startswith(prompt)
        return upto[len(prompt) :] if is_same and prompt != self._bare(number, True) else None

    def _shared_opener(self, number: int, prompt: str, upto: str) -> str:
        before = "" if number == 0 else self._bare(number)
        if not (upto.startswith(before) and prompt.startswith(before)):
            if self._is_marked:
                return ""
            raise self._unknown(number)
        shared = len(before)
        for piece in self._ends.special.finditer(prompt, shared):
            if not upto.startswith(prompt[shared : piece.end()], shared):
                break
            shared = piece.end()
        return prompt[:shared]

    def _shown_in(self, text: str, numbers: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return which answers a rendering shows as serving does, and which not."""
        shown: list[int] = []
        hidden: list[int] = []
        for number in numbers:
            turn = self._turn(number)
            (shown if turn.is_in(text) and self._end_is_there(turn, text) else hidden).append(number)
        return shown, hidden

    def _end_is_there(self, turn: _Turn, text: str) -> bool:
        """Return whether the end of an answer stands in a rendering, or can be added at its end."""
        if self._is_marked or self._ends.ended(turn.answer):
            return True
        end = len(turn.prompt) + len(turn.answer)
        return not text[end:].strip() or bool(self._ends.opener_at(text, end))

    def _reason(self, turn: _Turn, text: str) -> str:
        """Say why an answer is not learned in a rendering."""
        message = self._conversation.messages[turn.number]
        if turn.is_in(text):
            return ENDS_WITH_NOTHING
        thinks = THOUGHTS_END in turn.answer or any(message.get(name) for name in REASONING)
        earlier = any(
            message.get(name) for message in self._conversation.messages[: turn.number] for name in REASONING
        )
        return DROPS_THOUGHTS if thinks or earlier else RENDERS_ANEW

    def _parts(self, count: int, learned: Sequence[int]) -> list[Part]:
        """Return a rendering as parts with and without loss."""
        whole = self._render(count)
        if self._is_marked:
            return self._split_at_marks(whole, count, learned)
        parts: list[Part] = []
        done = 0
        opener = ""
        for number in learned:
            turn = self._turn(number)
            begin, end = len(turn.prompt), turn.end_in(whole)
            if begin < done:
                raise DataError(
                    f"message {number + 1}: the chat template renders this message before the one before it; mark "
                    "what is to be learned in the template with {% generation %}"
                )
            opener = self._ends.opener_at(whole, end)
            end += len(opener)
            parts += [(whole[done:begin], False), (whole[begin:end], True)]
            done = end
        if learned and self._ends.openers and not opener and not whole[done:].strip():
            # After calls the results follow, otherwise the user.
            has_calls = bool(self._conversation.messages[learned[-1]].get("tool_calls"))
            return [*parts, (self._ends.openers[1 if has_calls else 0], True)]
        return [*parts, (whole[done:], False)]

    def _split_at_marks(self, whole: str, count: int, learned: Sequence[int]) -> list[Part]:
        blocks = whole.split(GENERATION_BEGIN)
        flags = self._learned_blocks(count, learned, len(blocks) - 1)
        parts: list[Part] = [(blocks[0], False)]
        for block, is_learned in zip(blocks[1:], flags, strict=True):
            inside, end, outside = block.partition(GENERATION_END)
            if not end:
                raise DataError("the conversation contains the delimiter of a generation block; remove it")
            parts += [(inside, is_learned), (outside, False)]
        return parts

    def _learned_blocks(self, count: int, learned: Sequence[int], num_blocks: int) -> list[bool]:
        """Return whether each generation block belongs to a message that is learned.

        Rendering the messages up to one whose mask differs from the next one's shows how many blocks belong to them.
        """
        messages = self._conversation.messages[:count]
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        flags: list[bool] = []
        for number, following in zip(answers, [*answers[1:], None], strict=True):
            is_learned = number in learned
            if following is None:
                end = num_blocks
            elif (following in learned) == is_learned:
                continue
            else:
                end = self._render(following).count(GENERATION_BEGIN)
            if not len(flags) <= end <= num_blocks:
                raise DataError(
                    f"message {number + 1}: the chat template marks another number of answers if others follow, so "
                    "those to learn are unknown; give all answers the same weight"
                )
            flags += [is_learned] * (end - len(flags))
        return flags or [True] * num_blocks
