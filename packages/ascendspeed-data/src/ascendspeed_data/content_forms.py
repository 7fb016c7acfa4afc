"""The forms of `content` that a chat template takes: text, a list of text parts, and null beside tool calls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ascendspeed_data.conversation import CallArguments, Message
from ascendspeed_data.errors import DataError

PROBE = "zq7 probe"
"""A text that templates do not contain."""

Render = Callable[[Sequence[Message], Mapping[str, Any]], str]


@dataclass(frozen=True)
class _Forms:
    """What a template takes as the content of a role."""

    text: bool
    parts: bool


class ContentForms:
    """Finds out by trial what a template takes, once for each role.

    Args:
        render: renders messages with variables, or raises `DataError`.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._of_role: dict[str, _Forms] = {}
        self._of_null: Literal["absent", "null", "text"] | None = None

    def fit(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages whose content has a form that the template takes.

        A list of parts stays a list if the template takes lists, as in transformers and vLLM. Otherwise its texts are
        joined, see `joined_text`. Text becomes a list of one part if the template takes lists only.
        """
        made = []
        for message in messages:
            content = self._content(message)
            rest = {name: value for name, value in message.items() if name != "content"}
            # transformers takes keys off that are null.
            without = content is None and self._null_form() == "absent"
            made.append(rest if without else {**message, "content": content})
        return made

    def _content(self, message: Message) -> Any:
        content = message["content"]
        if content is None:
            return "" if self._null_form() == "text" else None
        forms = self._forms(message["role"])
        if isinstance(content, str):
            return content if forms.text or not forms.parts else [{"type": "text", "text": content}]
        return content if forms.parts else joined_text(content)

    def _forms(self, role: str) -> _Forms:
        if role not in self._of_role:
            parts = self._rendered(role, [{"type": "text", "text": PROBE}])
            # A template that prints the list itself does not take it.
            prints_list = "'text'" in parts or '"text"' in parts
            self._of_role[role] = _Forms(
                PROBE in self._rendered(role, PROBE), PROBE in parts and not prints_list
            )
        return self._of_role[role]

    def _rendered(self, role: str, content: Any) -> str:
        probed: Message = {"role": role, "content": content}
        user: Message = {"role": "user", "content": "a"}
        answer: Message = {"role": "assistant", "content": "b"}
        if role == "user":
            turns = [probed, answer]
        elif role == "assistant":
            turns = [user, probed]
        elif role in ("tool", "function"):
            turns = [user, _tool_call(""), {"tool_call_id": "abcdefghi", "name": "f", **probed}]
        else:
            turns = [probed, user, answer]
        text = self._try(turns)
        if text or isinstance(content, str):
            return text
        # The template may take lists only, in the other turns too.
        as_lists = [
            {**turn, "content": [{"type": "text", "text": said}]} if isinstance(said, str) else turn
            for turn in turns
            for said in (turn["content"],)
        ]
        return self._try(as_lists)

    def _null_form(self) -> Literal["absent", "null", "text"]:
        """Return what stands for null: no key, as in transformers; null; or an empty text."""
        if self._of_null is None:
            user: Message = {"role": "user", "content": "a"}
            call = _tool_call(None)
            absent = {name: value for name, value in call.items() if name != "content"}
            self._of_null = "text"
            forms: tuple[tuple[Literal["absent", "null"], Message], ...] = (
                ("absent", absent),
                ("null", call),
            )
            for form, message in forms:
                rendered = self._try([user, message])
                if rendered and "None" not in rendered:
                    self._of_null = form
                    break
        return self._of_null

    def _try(self, turns: list[Message]) -> str:
        try:
            return self._render(turns, {})
        except DataError:
            return ""


def joined_text(content: str | list[dict[str, str]] | None) -> str:
    """Return content as one text; parts are joined by line breaks.

    So does vLLM for a template that takes no lists (`_parse_chat_message_content_parts` in
    vllm/entrypoints/chat_utils.py). `apply_chat_template` of transformers joins nothing: it hands the list to the
    template.
    """
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    return content or ""


def _tool_call(content: str | None) -> Message:
    function = {"name": "f", "arguments": CallArguments({})}
    call = {"id": "abcdefghi", "type": "function", "function": function}
    return {"role": "assistant", "content": content, "tool_calls": [call]}
