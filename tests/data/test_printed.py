"""What a chat template reads but does not print is refused or counted, never lost."""

import random
from dataclasses import dataclass
from typing import Any

import pytest

from ascendspeed_data.answers import DROPS_THOUGHTS
from ascendspeed_data.chat_template import ChatTemplate
from ascendspeed_data.conversation import conversation_of
from ascendspeed_data.errors import DataError
from support.records import counted, encoded, shown_of
from support.tables import ReportTables

PRINTS = ("c", "c | trim", "c | upper", "c | tojson", "c ~ '!'", "'<b>' ~ c | trim ~ '</b>'")
"""Ways to print the whole of a content."""

LOSES = (
    "''",
    "c[:2]",
    "c | length",
    "c.split()[1:] | join(' ')",
    "(c if loop.last else '')",
    "(c if loop.first else '')",
)
"""Ways to lose content, or some of it."""

TEXTS = (
    "yes", "user", "x", "<|im_start|>", "assistant\n", " be brief ", "TOOLRESULT", "a b", "one\n\ntwo\n", "3", "🙂",
    "中文 字",
    '{"a": 1}', "?", "\nq", "im_end", "None", "</b>", "yes yes yes", "a longer text, with words in it",
)  # fmt: skip
CONTENT_FIRST = (
    "{% for m in messages %}{% set c = m['content'] | trim %}{% if m['role'] == 'user' %}<|im_start|>user\n"
    "{{ c }}<|im_end|>\n{% elif m['role'] == 'assistant' %}<|im_start|>assistant\n{{ c }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% set c = m.content %}{% set r = '' %}{% if m.reasoning_content is string %}{% set r = m.reasoning_content %}"
    "{% elif '</think>' in c %}{% set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{% generation %}"
    "{% if r and loop.index0 > ns.last %}{{ '<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ c }}<|im_end|>{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class MadeTemplate:
    """A template drawn at random, and what it prints of each role."""

    source: str
    of_role: dict[str, str]

    def loses(self, messages: list[dict[str, Any]]) -> bool:
        """Whether the template loses some of the messages, told by how it was made."""
        kept_at = {"(c if loop.first else '')": 0, "(c if loop.last else '')": len(messages) - 1}
        return any(
            way not in PRINTS and kept_at.get(way) != number
            for number, way in enumerate(self.of_role[message["role"]] for message in messages)
        )


def draw_template(draw: random.Random) -> MadeTemplate:
    of_role = {
        role: draw.choice(LOSES if draw.random() < share else PRINTS)
        for role, share in (("system", 0.4), ("user", 0.2), ("tool", 0.4), ("assistant", 0.1))
    }
    branches = ""
    for role, way in of_role.items():
        shown = f"{{{{ {way} }}}}<|im_end|>"
        if role == "assistant":
            shown = f"{{% generation %}}{shown}{{% endgeneration %}}"
        branches += f"{{% {'elif' if branches else 'if'} m.role == '{role}' %}}<|im_start|>{role}\n{shown}"
    reads_first = draw.choice(("{% set c = m['content'] %}", "{% set c = m.content %}"))
    return MadeTemplate(
        f"{{% for m in messages %}}{reads_first}{branches}{{% endif %}}{{% endfor %}}", of_role
    )


def draw_talk(draw: random.Random) -> list[dict[str, Any]]:
    talk = [{"role": "system", "content": draw.choice(TEXTS)}] if draw.random() < 0.5 else []
    for _ in range(draw.randint(1, 3)):
        talk.append({"role": "user", "content": draw.choice(TEXTS)})
        if draw.random() < 0.3:
            talk.append({"role": "tool", "content": draw.choice(TEXTS)})
        talk.append({"role": "assistant", "content": draw.choice(TEXTS)})
    return talk


def compare(tokenizer: Any, seed: int, templates: int, talks: int) -> tuple[int, int, list[str]]:
    """The conversations tried, how many lose something, and those that were judged wrongly."""
    draw = random.Random(seed)
    tried, lossy, differ = 0, 0, []
    for _ in range(templates):
        made = draw_template(draw)
        template = ChatTemplate.from_tokenizer(tokenizer, made.source)
        for _ in range(talks):
            talk = draw_talk(draw)
            lost = made.loses(talk)
            try:
                template.sample(conversation_of(talk))
                refused = ""
            except DataError as error:
                refused = str(error)
            tried += 1
            lossy += lost
            if lost != ("does not print" in refused or "does not read" in refused):
                differ.append(f"{made.of_role} {talk} {refused}")
    return tried, lossy, differ


def test_random_templates_that_lose_content_are_refused_and_no_other(
    chat_tokenizer: Any, report: ReportTables
) -> None:
    tried, lossy, differ = compare(chat_tokenizer, 3, templates=60, talks=25)
    header = ("conversations", "lose something", "judged wrongly")
    report.add("Templates that read content and lose it", header, tried, lossy, len(differ))
    assert not differ, differ[0]
    assert 300 < lossy < tried - 300


@pytest.mark.nightly
def test_many_random_templates_that_lose_content_are_refused_and_no_other(chat_tokenizer: Any) -> None:
    import time

    seed = time.time_ns()
    _, _, differ = compare(chat_tokenizer, seed, templates=1500, talks=40)
    assert not differ, (seed, differ[0])


@pytest.mark.parametrize("role", ["system", "tool", "developer"])
@pytest.mark.parametrize("content", ["Be rude.", "yes", "user", "q", [{"type": "text", "text": "Be rude."}]])
def test_a_message_that_a_template_reads_but_does_not_print_is_refused(
    chat_tokenizer: Any, role: str, content: Any
) -> None:
    chat_tokenizer.chat_template = CONTENT_FIRST
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    assert counted({"messages": talk}, "MessagesHandler", chat_tokenizer).num_documents == 1
    for at in (0, 1):
        record = {"messages": [*talk[:at], {"role": role, "content": content}, *talk[at:]]}
        error = str(encoded(record, "MessagesHandler", chat_tokenizer))
        assert (
            f"message {at + 1}: key 'content' (role {role!r}): the chat template does not print it" in error
        )
        assert "use a chat template that does, or remove the message" in error


def test_calls_and_tools_that_a_template_only_asks_for_are_refused(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = (
        "{% if tools %}You have tools.{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if not m.tool_calls %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    asked = {"role": "user", "content": "q"}
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    record = {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    error = str(encoded(record, "MessagesHandler", chat_tokenizer))
    assert "message 2: " in error
    assert "tool_calls" in error
    record = {
        "messages": [asked, {"role": "assistant", "content": "a"}],
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}],
    }
    error = str(encoded(record, "MessagesHandler", chat_tokenizer))
    assert "column 'tools': the chat template does not print all of it" in error


def test_thoughts_of_earlier_turns_are_learned_in_samples_of_their_own_and_must_be_printed_there(
    chat_tokenizer: Any,
) -> None:
    chat_tokenizer.chat_template = QWEN_3
    asked, answered = {"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}
    thinks = {"role": "assistant", "content": "<think>\nhm, so\n</think>\n\nno"}
    reasons = {"role": "assistant", "content": "no", "reasoning_content": "hm"}
    for answer in (thinks, reasons):
        made = counted({"messages": [asked, answer]}, "MessagesHandler", chat_tokenizer)
        assert made.unused_columns == {}
        made = counted({"messages": [asked, answer, asked, answered]}, "MessagesHandler", chat_tokenizer)
        assert made.unused_columns == {}
        assert made.split_conversations == {DROPS_THOUGHTS: 1}
        assert made.num_sequences == 2
        weighed = [asked, {**answer, "weight": 0}, asked, answered]
        made = counted({"messages": weighed}, "MessagesHandler", chat_tokenizer)
        assert made.unused_columns == {"thoughts of earlier turns": 1}
        assert made.num_sequences == 1
    chat_tokenizer.chat_template = QWEN_3.replace("if r and loop.index0 > ns.last", "if false")
    for answer in (thinks, reasons):
        error = str(encoded({"messages": [asked, answer]}, "MessagesHandler", chat_tokenizer))
        assert "message 2: key '" in error
        assert "does not print" in error
    # The end of thoughts in a text of the user is a text like any other.
    chat_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    )
    error = str(
        encoded(
            {"messages": [{**asked, "content": "why </think> so"}, answered]},
            "MessagesHandler",
            chat_tokenizer,
        )
    )
    assert "message 1: key 'content' (role 'user'): the chat template does not print all of it" in error


def test_templates_that_take_lists_only_print_all(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {% for p in m.content | selectattr('type', 'equalto', "
        "'text') %}{{ p['text'] }}{% endfor %}{% else %}{{ ' ' + m.content[0]['text'] + '<|im_end|>' }}{% endif %}"
        "{% endfor %}"
    )
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]
    assert shown_of("MessagesHandler", {"messages": talk}, chat_tokenizer) == "[INST] q yes<|im_end|>"
