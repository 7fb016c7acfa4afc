"""Find what a chat template reads but does not print, so that no part of a conversation is lost without a word.

Templates trim, rename and rearrange what they print, so the text alone does not tell. A second rendering does: it gets
the same conversation with a mark in each of its parts, and the marks that are missing in its text belong to parts that
are lost. Where the texts of the messages stand in the text one after the other, with nothing but the template's own
text between them, nothing is lost, and the second rendering is not needed.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ascendspeed_data.answers import THOUGHTS_END
from ascendspeed_data.conversation import CallArguments, Message
from ascendspeed_data.errors import DataError
from ascendspeed_data.fields import MESSAGE_CONTENT, REASONING, message_key

MAX_GAPS = 1000
"""Texts between messages to remember for each template; templates have a few."""

_WORDS = re.compile(r"<[^<>\n]{1,80}>|[^\W_]+")
"""Tags, to pass over, and words."""

Render = Callable[[Sequence[Message], Mapping[str, Any], bool], str]


@dataclass(frozen=True)
class _Part:
    """A part of a conversation that has a mark.

    Attributes:
        number: of the message, from 1; 0 for a variable of the template.
        key: of the message, or the name of the variable.
        is_thought: whether the part is what an assistant thinks before it answers.
    """

    number: int
    key: str
    is_thought: bool = False


class PrintedParts:
    """Checks the conversations that one template renders.

    Args:
        render: renders messages with variables, and the start of an answer if asked to; or raises `DataError`.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._gaps: set[str] = set()

    def check(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        text: str,
        add_generation_prompt: bool = False,
        elsewhere: Collection[int] = (),
    ) -> list[str]:
        """Return what the template leaves out on purpose: thoughts of earlier turns and names of tools.

        Args:
            messages: as the template got them.
            variables: further variables that it got.
            text: what it made of them.
            add_generation_prompt: whether it was asked for the start of an answer.
            elsewhere: numbers from 0 of messages whose thoughts need not be printed here.

        Raises:
            DataError: a message, a part of one, or a variable is not in the text.
        """
        gaps = None if variables else _gaps(messages, text)
        if gaps is not None and self._gaps.issuperset(gaps):
            return []
        marked = _Marks(messages, variables, text)
        try:
            shown = self._render(marked.messages, marked.variables, add_generation_prompt).casefold()
        except DataError:
            # The template takes certain texts only, so what it printed must be there as it is.
            shown = None
        if shown is None:
            lost = [part for part, value in marked.texts if value.strip() not in text]
            kept = [part for part, value in marked.texts if value.strip() in text]
        else:
            lost = [part for mark, part in marked.parts.items() if mark not in shown]
            kept = [part for mark, part in marked.parts.items() if mark in shown]
        counted = _judged(messages, lost, kept, elsewhere)
        if gaps is not None and not lost:
            if len(self._gaps) > MAX_GAPS:
                self._gaps.clear()
            self._gaps.update(gaps)
        return counted


def _gaps(messages: Sequence[Message], text: str) -> list[str] | None:
    """Return the text before, between and after the contents of plain messages; `None` if they do not follow in order.

    A gap begins with the roles on both sides, so that it is known only where the template printed it.
    """
    gaps = []
    done, before = 0, ""
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or len(message) != 2:
            return None
        content = content.strip()
        begin = text.find(content, done)
        if begin < 0:
            return None
        gaps.append(f"{before} {message['role']} {text[done:begin]}")
        done, before = begin + len(content), message["role"]
    return [*gaps, f"{before} {text[done:]}"]


class _Marks:
    """A copy of a conversation with a mark in each part that says something.

    Args:
        messages: as the template got them.
        variables: further variables that it got.
        text: what it made of them, in which no mark occurs.

    Attributes:
        messages: the copy.
        variables: with marks in tools and documents.
        parts: part of each mark; before the mark stands the word that has it, and both are folded to lower case.
        texts: the parts of messages that are texts, with their text.
    """

    def __init__(self, messages: Sequence[Message], variables: Mapping[str, Any], text: str) -> None:
        self.parts: dict[str, _Part] = {}
        self.texts: list[tuple[_Part, str]] = []
        self._base = "zq7k"
        while self._base in text.casefold():
            self._base += "q"
        self.messages = [self._message(message, number) for number, message in enumerate(messages, 1)]
        self.variables = {name: self._variable(name, value) for name, value in variables.items()}

    def _mark(self, part: _Part, word: str = "") -> str:
        mark = f"{self._base}{len(self.parts)}z"
        self.parts[word.casefold() + mark] = part
        return mark

    def _message(self, message: Message, number: int) -> Message:
        made = dict(message)
        thoughts: dict[str, str] = {}
        is_answer = message["role"] == "assistant"
        for name, value in message.items():
            if name == "content" and isinstance(value, list):
                made[name] = [{**part, "text": self._text(part["text"], number, name)} for part in value]
            elif name in REASONING and isinstance(value, str) and value.strip():
                # Templates read one of the names.
                thoughts[value] = thoughts.get(value) or self._text(value, number, name, is_thought=True)
                made[name] = thoughts[value]
            elif name in MESSAGE_CONTENT.names and isinstance(value, str):
                thoughts_end = value.rfind(THOUGHTS_END) if name == "content" and is_answer else -1
                made[name] = self._text(value, number, name, thoughts_end=thoughts_end)
            elif name == "tool_calls":
                made[name] = [self._call(call, number, name) for call in value]
            elif name == "function_call":
                made[name] = self._call(value, number, name)
        return made

    def _text(
        self, text: str, number: int, key: str, is_thought: bool = False, thoughts_end: int = -1
    ) -> str:
        """Mark the first word, and the last one of each line; tags stay, because templates look for them."""
        if not text.strip():
            return text
        self.texts.append((_Part(number, key, is_thought), text))
        words: list[tuple[int, int]] = []
        begin = 0
        for line in text.splitlines(keepends=True):
            found = _outer_words(line, not words)
            words += [(begin + first, begin + end) for first, end in found]
            begin += len(line)
        made, done = [], 0
        for first, end in dict.fromkeys(words or [(len(text.rstrip()), len(text.rstrip()))]):
            part = _Part(number, key, is_thought or end <= thoughts_end)
            made += [text[done:end], self._mark(part, text[first:end])]
            done = end
        return "".join(made) + text[done:]

    def _call(self, call: Message, number: int, key: str) -> Message:
        if isinstance(call.get("function"), dict):
            return {**call, "function": self._call(call["function"], number, key)}
        part = _Part(number, key)
        made = dict(call)
        if isinstance(call.get("name"), str) and call["name"].strip():
            made["name"] = call["name"] + self._mark(part)
        if call.get("arguments"):
            made["arguments"] = CallArguments({**call["arguments"], self._mark(part): 0})
        return made

    def _variable(self, name: str, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return [self._entry(name, entry) for entry in value]

    def _entry(self, name: str, entry: Any) -> Any:
        """Mark the name of a tool or the text of a document; other entries stay as they are."""
        if not isinstance(entry, dict):
            return entry
        if isinstance(entry.get("function"), dict):
            return {**entry, "function": self._entry(name, entry["function"])}
        key = "text" if name == "documents" else "name"
        if name not in ("tools", "functions", "documents") or not isinstance(entry.get(key), str):
            return entry
        return {**entry, key: entry[key] + self._mark(_Part(0, name))}


def _outer_words(line: str, with_first: bool) -> list[tuple[int, int]]:
    """Return where the first word of a line, if asked for, and the last one begin and end."""
    if "<" in line:
        found = [word.span() for word in _WORDS.finditer(line) if not word[0].startswith("<")]
    else:
        first = _WORDS.search(line)
        if first is None:
            return []
        # The last word lies in what follows the last white space, or, if that is punctuation only, anywhere before it.
        last_chunk = len(line) - len(line.rstrip().rpartition(" ")[2]) - (len(line) - len(line.rstrip()))
        in_chunk = list(_WORDS.finditer(line, last_chunk)) or list(_WORDS.finditer(line))
        found = [first.span(), in_chunk[-1].span()]
    return (found[:1] if with_first else []) + found[-1:]


def _judged(
    messages: Sequence[Message], lost: Sequence[_Part], kept: Sequence[_Part], elsewhere: Collection[int]
) -> list[str]:
    """Return the lost parts that a template may leave out, to be counted.

    Raises:
        DataError: another part is lost.
    """
    last_question = max((n for n, message in enumerate(messages, 1) if message["role"] == "user"), default=0)
    counted: dict[str, None] = {}
    for part in lost:
        if not part.number:
            raise DataError(
                f"column {part.key!r}: the chat template does not print all of it for this conversation; use a chat "
                "template that does, or remove the column"
            )
        role = messages[part.number - 1]["role"]
        if part.key == "name" and role in ("tool", "function"):
            counted[message_key("name")] = None
        elif part.is_thought and part.number - 1 in elsewhere:
            continue
        elif part.is_thought and part.number < last_question:
            counted["thoughts of earlier turns"] = None
        else:
            whole = not any(other.number == part.number and other.key == part.key for other in kept)
            names = [name for name in REASONING if name in messages[part.number - 1]]
            what = f"key {' or '.join(map(repr, names if part.key in REASONING else [part.key]))}"
            raise DataError(
                f"message {part.number}: {what} (role {role!r}): the chat template does not print "
                f"{'it' if whole else 'all of it'}, so it would not be learned; use a chat template that does, or "
                f"remove the {'message' if whole and part.key == 'content' else 'key'}"
            )
    return list(counted)
