"""Conversations drawn at random, with templates in the styles of well-known models, to compare with transformers."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

_TOOL_CALL_TEXT = (
    '{% for c in m.tool_calls %}{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}"
)
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n# Tools' }}{% for t in tools %}{{ '\\n' }}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
)

STYLES = {
    # One line for each message; content is added to text.
    "chatml": (
        _TOOLS
        + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m.role == 'assistant' %}[["
        "{% if m.content %}{{ m.content }}{% endif %}{% if m.tool_calls %}" + _TOOL_CALL_TEXT + "{% endif %}"
        "{{ '<|im_end|>' }}]]{{ '\\n' }}{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}" + _PROMPT
    ),
    # Content is trimmed; a tool's answer has a role of its own; the whole call is printed as JSON.
    "llama3": (
        "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}"
        "{%- endfor %}{{- '<|im_end|>' }}{%- endif %}"
        "{%- for message in messages %}{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\\n\\n' }}[["
        "{%- if 'tool_calls' in message %}{%- for c in message.tool_calls %}{%- set f = c.function %}"
        "{{- '{\"name\": \"' + f.name + '\", \"parameters\": ' }}{{- f.arguments | tojson }}{{- '}' }}{%- endfor %}"
        "{%- if message.content %}{{- message.content | trim }}{%- endif %}"
        "{%- else %}{{- message['content'] | trim }}{%- endif %}{{- '<|im_end|>' }}]]"
        "{%- elif message.role == 'tool' %}{{- '<|im_start|>ipython\\n\\n' }}"
        "{%- if message.content is mapping or message.content is iterable and message.content is not string %}"
        "{{- message.content | tojson }}{%- else %}{{- message.content }}{%- endif %}{{- '<|im_end|>' }}"
        "{%- else %}{{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim + '<|im_end|>' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
    ),
    # Thoughts, tools in the system message, answers of tools joined in one user turn, calls nested or flat.
    "qwen": (
        "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}"
        "{{- messages[0].content + '\\n\\n' }}{%- endif %}{{- '<tools>' }}{%- for t in tools %}{{- '\\n' }}"
        "{{- t | tojson }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- elif messages[0].role == 'system' %}"
        "{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}"
        "{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
        "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}"
        "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}[["
        "{%- if m.reasoning_content is string and m.reasoning_content %}"
        "{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
        "{{- m.content }}{%- if m.tool_calls %}{%- for tool_call in m.tool_calls %}"
        "{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}"
        "{{- '<tool_call>\\n{\"name\": \"' }}{{- tool_call.name }}{{- '\", \"arguments\": ' }}"
        "{%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}"
        "{{- tool_call.arguments | tojson }}{%- endif %}"
        "{{- '}\\n</tool_call>' }}{%- endfor %}{%- endif %}{{- '<|im_end|>' }}]]{{- '\\n' }}"
        "{%- elif m.role == 'tool' %}{%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}"
        "{{- '<|im_start|>user' }}{%- endif %}{{- '\\n<tool_response>\\n' }}{{- m.content }}"
        "{{- '\\n</tool_response>' }}"
        "{%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{- '<|im_end|>\\n' }}{%- endif %}"
        "{%- endif %}{%- endfor %}" + _PROMPT
    ),
    # Arguments are added to text, so they must be text; a null content announces tool calls.
    "deepseek": (
        _TOOLS
        + "{%- for message in messages %}{%- if message['role'] == 'system' %}{{- message['content'] }}"
        "{%- elif message['role'] == 'user' %}{{- '<|im_start|>User' + message['content'] }}"
        "{%- elif message['role'] == 'assistant' and message['content'] is none %}{{- '<|im_start|>Assistant' }}[["
        "{%- for tool in message['tool_calls'] %}{{- tool['type'] + '<sep>' + tool['function']['name'] "
        "+ '\\n```json\\n' + tool['function']['arguments'] + '\\n```' }}{%- endfor %}{{- '<|im_end|>' }}]]"
        "{%- elif message['role'] == 'assistant' %}{{- '<|im_start|>Assistant' }}"
        "[[{{- message['content'] + '<|im_end|>' }}]]"
        "{%- elif message['role'] == 'tool' %}{{- '<|im_start|>tool' + message['content'] }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>Assistant' }}{%- endif %}"
    ),
    # Content may be a list of parts, as templates of models with pictures take it.
    "parts": (
        _TOOLS
        + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}[["
        "{% if m.content is string %}{{ m.content }}{% elif m.content %}{% for p in m.content %}{{ p.text }}"
        "{% endfor %}{% endif %}{% if m.tool_calls %}" + _TOOL_CALL_TEXT + "{% endif %}"
        "{{ '<|im_end|>' }}]]{{ '\\n' }}{% else %}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'text' %}"
        "{{ p.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}" + _PROMPT
    ),
}  # fmt: skip
"""Templates by style; `[[` and `]]` stand around what the assistant says."""

TAKES_PARTS = ("parts",)
TAKES_TEXT_ARGUMENTS = ("deepseek",)
TAKES_THOUGHTS = ("qwen",)
WEIGHTS = (
    "weight",
    "loss_weight",
    "loss_mask",
    "loss",
    "train",
    "training",
    "trainable",
    "train_on_turn",
    "learn",
)
HARMLESS = ("id", "timestamp", "tokens", "rating")


def template_of(style: str, marked: bool) -> str:
    """The template of a style, with or without `{% generation %}`."""
    begin, end = ("{% generation %}", "{% endgeneration %}") if marked else ("", "")
    return STYLES[style].replace("[[", begin).replace("]]", end)


@dataclass(frozen=True)
class Drawn:
    """A conversation.

    Attributes:
        record: as a user's file has it, in one of the spellings.
        messages: what transformers gets for it.
        tools: what transformers gets as tools.
        learned: for each assistant message, whether it is learned.
    """

    record: dict[str, Any]
    messages: list[Message]
    tools: list[dict[str, Any]] | None
    learned: list[bool]


class Draw:
    """Draws conversations for one style of template."""

    def __init__(self, style: str, seed: int) -> None:
        self.style = style
        self.random = random.Random(f"{style} {seed}")

    def text(self) -> str:
        pieces = (
            "hi", "Zürich", "中文", "字", "🙂", " ", "  ", "\n", '"', "\\", "{", "}", "{{ x }}", "None", "<b>", "&",
            "9", "é", "'", "\t",
        )  # fmt: skip
        words = [self.random.choice(pieces) for _ in range(self.random.randint(1, 9))]
        return "x" + "".join(words) + "."

    def value(self, depth: int = 0) -> Any:
        kind = self.random.randrange(8 if depth < 2 else 5)
        if kind > 5:
            return {self.text(): self.value(depth + 1) for _ in range(self.random.randrange(3))}
        if kind == 5:
            return [self.value(depth + 1) for _ in range(self.random.randrange(3))]
        return (self.text(), self.random.randrange(-9, 9), 0.5, None, True)[kind]

    def conversation(self) -> Drawn:
        chance = self.random.random
        rows: list[Message] = []
        seen: list[Message] = []
        learned: list[bool] = []
        has_system = chance() < 0.4
        if has_system:
            self._say(rows, seen, "system")
        for _ in range(self.random.randint(1, 3)):
            self._say(rows, seen, "user")
            if chance() < 0.3:
                self._call(rows, seen)
                learned.append(self._weigh(rows[-1]))
                for _ in range(self.random.randint(1, 2)):
                    self._say(rows, seen, "tool")
            self._say(rows, seen, "assistant")
            if self.style in TAKES_THOUGHTS and chance() < 0.5:
                thought = self.text()
                rows[-1][self.random.choice(("reasoning_content", "thinking", "reasoning"))] = thought
                seen[-1]["reasoning_content"] = thought
            learned.append(self._weigh(rows[-1]))
        if not any(learned):
            learned[-1] = True
            for name in WEIGHTS:
                rows[-1].pop(name, None)
        for row in rows:
            if chance() < 0.2:
                row[self.random.choice(HARMLESS)] = self.value()
            if row["role"] != "assistant" and chance() < 0.1:
                row[self.random.choice(WEIGHTS)] = self.random.choice((0, False, None))
        tools = [self._tool() for _ in range(self.random.randint(1, 2))] if chance() < 0.4 else None
        record: dict[str, Any] = {"messages": rows}
        if tools:
            record["tools"] = self._spelled(tools, [self._spelled(tool, tool) for tool in tools])
        if has_system and isinstance(rows[0]["content"], str) and rows[0].keys() == {"role", "content"}:
            record = {**record, "messages": rows[1:], "system": rows[0]["content"]}
        return Drawn(record, seen, tools, learned)

    def _spelled(self, as_text: Any, plain: Any) -> Any:
        return (
            json.dumps(as_text, ensure_ascii=self.random.random() < 0.5)
            if self.random.random() < 0.4
            else plain
        )

    def _say(self, rows: list[Message], seen: list[Message], role: str) -> None:
        if self.random.random() < 0.3:
            texts = [self.text() for _ in range(self.random.randint(1, 3))]
            parts = [{"type": "text", "text": text} for text in texts]
            rows.append({"role": role, "content": parts})
            seen.append({"role": role, "content": parts if self.style in TAKES_PARTS else "\n".join(texts)})
        else:
            rows.append({"role": role, "content": self.text()})
            seen.append({"role": role, "content": rows[-1]["content"]})
        if role == "tool":
            rows[-1]["tool_call_id"] = seen[-1]["tool_call_id"] = "c1"

    def _call(self, rows: list[Message], seen: list[Message]) -> None:
        calls, plain = [], []
        for number in range(self.random.randint(1, 2)):
            arguments = {self.text(): self.value() for _ in range(self.random.randrange(3))}
            text = json.dumps(arguments, ensure_ascii=False)
            shown = text if self.style in TAKES_TEXT_ARGUMENTS else arguments
            given = self.random.choice((text, arguments))
            head = {"id": f"c{number}", "type": "function"}
            calls.append({**head, "function": {"name": "f", "arguments": given}})
            plain.append({**head, "function": {"name": "f", "arguments": shown}})
        said = None if self.style == "deepseek" else self.random.choice(("", self.text()))
        rows.append({"role": "assistant", "content": said, "tool_calls": self._spelled(calls, calls)})
        seen.append({"role": "assistant", "content": said, "tool_calls": plain})

    def _weigh(self, row: Message) -> bool:
        if self.random.random() < 0.5:
            return True
        learned = self.random.random() < 0.5
        value = int(learned)
        row[self.random.choice(WEIGHTS)] = self.random.choice((value, float(value), bool(value)))
        return learned

    def _tool(self) -> dict[str, Any]:
        parameters = {
            "type": "object",
            "properties": {self.text(): {"type": "string", "description": self.text()}},
        }
        return {
            "type": "function",
            "function": {"name": "f", "description": self.text(), "parameters": parameters},
        }


def learned_spans(spans: Sequence[tuple[int, int]], learned: Sequence[bool]) -> list[tuple[int, int]]:
    """The spans of what is learned; transformers gives one span for each assistant message."""
    assert len(spans) == len(learned)
    return [span for span, flag in zip(spans, learned, strict=True) if flag]
