"""Conversations through the templates of the common families: ids against transformers, masks against trl.

What is to be learned follows from what a served model gets: the prompt of an answer is transformers' rendering of the
messages before it with `add_generation_prompt`, and what the rendering up to the answer has after that is the answer.
"""

import json
import random
from collections import Counter
from itertools import groupby
from typing import Any

import pytest

from ascendspeed_data.errors import DataError
from ascendspeed_data.fast_tokenizer import ExactEncoder
from ascendspeed_data.handlers.chat import MessagesHandler
from ascendspeed_data.prompting import layout_named
from ascendspeed_data.sample_encoding import encode_samples
from ascendspeed_data.template_values import TemplateValues
from ascendspeed_data.tokenizer import load_tokenizer
from support.chat_templates import (
    KINDS,
    TAKES_LISTS_ONLY,
    Draw,
    Drawn,
    in_wire_form,
    make_tokenizer,
    templates,
)
from support.tables import ReportTables

TEMPLATES = templates()

ALLOWED = ("does not read it", "does not print", "does not read, so")
"""Of templates that take a conversation and leave a part of it out."""

LEFT_OUT_BY_TRL = {
    "diffusion_gemma": "trl learns neither <|tool_response>, which ends calls, nor the opener after results",
}
"""Pieces that follow the prompt and end up in no mark of trl."""

BEGINS_OTHERWISE = {
    # DeepSeek-R1's template takes the thoughts off an answer, but its prompt opens them.
    "deepseek_r1_distill": "<think>Ċ",
    "deepseekv3": "<think>Ċ",
    # Without enable_thinking the prompt closes thoughts, and the answer has some.
    "qwen3_5_nothink": "ĊĊ</think>ĊĊ",
}
"""The end of prompts after which the template renders no answer."""

Rows = list[tuple[list[int], list[int]]]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("every-template")
    theirs = make_tokenizer(folder)
    ours = load_tokenizer(folder)
    ours.template_values = TemplateValues(day="now")
    return theirs, ours


class Compared:
    """Conversations of one template against transformers and trl."""

    def __init__(self, tokenizers: tuple[Any, Any], name: str) -> None:
        self.theirs, self.ours = tokenizers
        self.name = name
        self.source, self.twin = TEMPLATES[name]
        self.counts = Counter[str]()

    def ids_of(self, drawn: Drawn, count: int, add_generation_prompt: bool = False) -> list[int]:
        made = self.theirs.apply_chat_template(
            drawn.messages[:count],
            tools=drawn.tools,
            chat_template=self.source,
            add_generation_prompt=add_generation_prompt,
        )
        return list(made["input_ids"])

    def rows(self, record: dict[str, Any]) -> Rows:
        self.ours.chat_template = self.source
        samples = MessagesHandler().samples(json.loads(json.dumps(record)), self.ours)
        encoded = encode_samples(samples, self.ours, ExactEncoder(self.ours), [], True)
        return [(ids.tolist(), labels.tolist()) for ids, labels in encoded]

    def check(self, drawn: Drawn) -> None:
        try:
            whole = self.ids_of(drawn, len(drawn.messages))
        except Exception:  # noqa: BLE001 - a template may refuse in any way
            whole = None
        try:
            rows = self.rows(drawn.record)
        except DataError as error:
            self.counts["refused"] += 1
            if whole is not None:
                # What is refused is lost in transformers' rendering, also of the conversation up to its message.
                assert any(words in str(error) for words in ALLOWED), (drawn.record, error)
                shown = self.theirs.decode(whole)
                assert any(text not in shown for text in drawn.texts), (drawn.record, error)
            return
        if whole is None:
            self.counts["refused by transformers only"] += 1
            return
        self.counts["equal"] += 1
        assert len({len(ids) for ids, _ in rows}) == len(rows)
        if self.name != "gptoss":
            assert rows[-1][0][: len(whole)] == whole, drawn.record
        self.check_answers(drawn, rows)
        self.check_wire_form(drawn, rows)

    def check_answers(self, drawn: Drawn, rows: Rows) -> None:
        """Each answer is learned once, right after the prompt that a server gives, and nothing else is."""
        runs = [(ids, *run) for ids, labels in rows for run in learned_runs(ids, labels)]
        answers = [n for n, message in enumerate(drawn.messages) if message["role"] == "assistant"]
        assert len(runs) == len(answers), (drawn.record, [self.theirs.decode(i[b:e]) for i, b, e in runs])
        for number in answers:
            prompt, upto = self.ids_of(drawn, number, True), self.ids_of(drawn, number + 1)
            if self.name == "gptoss" and upto[: len(prompt)] != prompt:
                # The last answer takes the thoughts before a call off, which its prompt has.
                begin = next(b for ids, b, _ in runs if ids[:b] == prompt)
                answer = next(ids[b:e] for ids, b, e in runs if b == begin and ids[:b] == prompt)
                assert upto[-len(answer) :] == answer
                upto = prompt + answer
            if upto[: len(prompt)] != prompt:
                # A prompt that opens thoughts, before an answer that closes them at once: the line breaks on both
                # sides of the edge are one token.
                left_out = BEGINS_OTHERWISE.get(self.name, "Ċ")
                pieces = self.theirs.convert_ids_to_tokens(prompt)
                assert "".join(pieces).endswith(left_out), (drawn.record, self.theirs.decode(prompt))
                while left_out:
                    left_out = left_out.removesuffix(pieces.pop())
                prompt = prompt[: len(pieces)]
                assert upto[: len(prompt)] == prompt, drawn.record
            found = [(ids, end) for ids, begin, end in runs if ids[:begin] == prompt]
            assert len(found) == 1, (drawn.record, self.theirs.decode(prompt))
            ids, end = found[0]
            self.check_end(ids[len(prompt) : end], upto[len(prompt) :], drawn)
        self.check_trl(drawn, rows)

    def check_end(self, learned: list[int], answer: list[int], drawn: Drawn) -> None:
        """The answer is learned up to what ends it, white space after that aside."""
        kept = len(answer)
        while kept and self.is_space(answer[kept - 1]) and self.is_end(answer[kept - 2]):
            kept -= 1
        allowed = [answer[:kept]]
        if self.name.startswith("phi3"):
            # <|endoftext|>, which ends a conversation but no earlier answer.
            allowed.append(answer[: kept - 2])
        if learned not in allowed:
            # What ends the answer stands in no rendering up to it: the next turn's opener, or the end of the sequence.
            assert self.name in ("glm4moe", "glm4", "baichuan2"), drawn.record
            assert learned[:-1] == answer, (drawn.record, self.theirs.decode(learned))
            ends = ("</s>",) if self.name == "baichuan2" else ("<|user|>", "<|observation|>")
            assert self.theirs.convert_ids_to_tokens(learned[-1]) in ends

    def check_trl(self, drawn: Drawn, rows: Rows) -> None:
        """trl's marks are the same, but for what the prompt holds and white space after an end."""
        if self.twin is None or self.name in LEFT_OUT_BY_TRL:
            return
        for ids, labels in rows:
            answers = [n for n, m in enumerate(drawn.messages, 1) if m["role"] == "assistant"]
            rendered = [n for n in answers[::-1] if (whole := self.ids_of(drawn, n)) == ids[: len(whole)]]
            if not rendered:
                self.counts["rendered otherwise by trl"] += 1
                continue
            made = self.theirs.apply_chat_template(
                drawn.messages[: rendered[0]],
                tools=drawn.tools,
                chat_template=self.twin,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            if list(made["input_ids"]) not in (ids, ids[:-1]):
                self.counts["rendered otherwise by trl"] += 1
                continue
            self.counts["masks of trl"] += 1
            runs = learned_runs(ids, labels)
            mask = list(made["assistant_masks"])
            for begin, end in runs:
                assert all(mask[begin:end]), (drawn.record, self.theirs.decode(ids[begin:end]))
            # The last answer begins where its prompt ends, and trl marks nothing behind it but white space.
            behind = [token for token, marked in zip(ids, mask, strict=False) if marked][
                sum(mask[: runs[-1][1]]) :
            ]
            assert all(map(self.is_space, behind)), (drawn.record, self.theirs.decode(behind))

    def check_wire_form(self, drawn: Drawn, rows: Rows) -> None:
        """Arguments and tools as JSON text give the same."""
        if drawn.tools:
            assert self.rows(in_wire_form(drawn).record) == rows

    def is_space(self, token: int) -> bool:
        return not self.theirs.decode([token]).strip()

    def is_end(self, token: int) -> bool:
        return token in self.theirs.added_tokens_decoder or self.is_space(token)


def learned_runs(ids: list[int], labels: list[int]) -> list[tuple[int, int]]:
    """Where runs of learned tokens begin and end."""
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    found, position = [], 0
    for learned, group in groupby(labels, lambda label: label != -100):
        length = len(list(group))
        if learned:
            found.append((position, position + length))
        position += length
    return found


def compare(tokenizers: tuple[Any, Any], name: str, seed: object, count: int) -> Counter[str]:
    compared = Compared(tokenizers, name)
    for kind in KINDS:
        draw = Draw(f"{seed}/{name}/{kind}")
        for _ in range(count):
            compared.check(draw.conversation(kind, as_lists=name in TAKES_LISTS_ONLY))
    return compared.counts


def add_row(report: ReportTables, name: str, counts: Counter[str]) -> None:
    header = ("template", *(columns := ("equal", "refused", "masks of trl", "rendered otherwise by trl")))
    report.add(
        "Templates of the families against transformers and trl", header, name, *(counts[c] for c in columns)
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_masks_equal_transformers_and_trl(
    tokenizers: tuple[Any, Any], name: str, report: ReportTables
) -> None:
    counts = compare(tokenizers, name, 1, 1)
    add_row(report, name, counts)
    assert counts["equal"] >= 1
    if TEMPLATES[name][1] is not None and name not in LEFT_OUT_BY_TRL:
        assert counts["masks of trl"] >= 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", TEMPLATES)
def test_many_ids_and_masks_equal_transformers_and_trl(
    tokenizers: tuple[Any, Any], name: str, report: ReportTables
) -> None:
    import time

    seed = time.time_ns()
    counts = compare(tokenizers, name, seed, 35)
    add_row(report, name, counts)
    assert counts["equal"] >= 40, (seed, counts)


def test_control_that_users_spell_is_text(tokenizers: tuple[Any, Any], report: ReportTables) -> None:
    """Ids are those of transformers with `sanitize_control_tokens`, which encodes such pieces as text."""
    theirs, ours = tokenizers
    compared, spelled = 0, 0
    for name, (source, _) in TEMPLATES.items():
        draw = random.Random(name)
        ours.chat_template = source
        layout = layout_named("tokenizer", ours)
        pieces = [piece for piece in ours.added_ids if piece in source]
        words = ["the", "year", *draw.choices(pieces, k=3), "was", "it"]
        draw.shuffle(words)
        content: Any = "a" + draw.choice(("", " ")).join(words) + "b"
        if name in TAKES_LISTS_ONLY:
            content = [{"type": "text", "text": content}]
        asked = [{"role": "user", "content": content}]
        given = theirs.apply_chat_template(
            asked, chat_template=source, add_generation_prompt=True, sanitize_control_tokens=True
        )
        assert layout.ids(asked) == list(given["input_ids"]), (name, content)
        plain = theirs.apply_chat_template(asked, chat_template=source, add_generation_prompt=True)
        compared += 1
        spelled += list(plain["input_ids"]) != list(given["input_ids"])
    report.add("Control that users spell", ("prompts", "other ids if read as control"), compared, spelled)
    assert spelled > compared / 2
