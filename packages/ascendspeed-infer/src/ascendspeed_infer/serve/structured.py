"""Answers of a given form: JSON, JSON of a schema, or a call of a tool, by a grammar over tokens (llguidance)."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.answer_form import AnswerForm
from ascendspeed_infer.channels import CHANNEL, CONSTRAIN, END, MESSAGE, START
from ascendspeed_infer.tool_calls import ARGUMENTS_MARK, CALL_MARKS, LIST_MARK

WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,40}"
"""Between the parts of JSON: some, so that a model does not write it for ever."""
NEW_LINE = "\n"
RECENT_TOKENS = 16
"""In which the end of thoughts is looked for."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Grammars:
    """Makes constraints for the tokens of one model.

    Args:
        tokenizer: of the model.
        vocab_size: V, which may be more than the tokenizer has.
        end_ids: that end a text.

    Raises:
        AscendSpeedError: llguidance is not installed, or nothing ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise AscendSpeedError(
                "llguidance is not installed on the server; pip install ascendspeed-infer[structured]"
            ) from None
        if not end_ids:
            raise AscendSpeedError("the model has no token that ends a text, so no form can be asked for")
        self._vocab_size, self._tokenizer = vocab_size, tokenizer
        self._matcher: Any = llguidance.LLMatcher
        wrapped = llguidance.TokenizerWrapper(_TokenBytes(tokenizer, vocab_size, end_ids[0]))
        self._tokens = llguidance.LLTokenizer(wrapped, eos_token=list(end_ids))

    def json(self, schema: Mapping[str, Any], form: AnswerForm, thinks: bool) -> "GrammarConstraint":
        """Return what holds a text to JSON.

        Args:
            schema: JSON Schema of the value.
            form: of answers.
            thinks: whether the prompt opened thoughts, after whose end the JSON begins.

        Raises:
            AscendSpeedError: the schema is wrong, or says something that cannot be held to.
        """
        final = f'thought? {_piece(form, CHANNEL)} "final" {_piece(form, MESSAGE)}'
        opened = final if form.is_in_channels else ""
        return self._of_lark([f"start: {opened} value", f"value: {_json_rule(schema)}"], form, thinks)

    def tool_call(
        self, functions: Sequence[Mapping[str, Any]], form: AnswerForm, thinks: bool
    ) -> "GrammarConstraint":
        """Return what holds a text to one call of one of some functions.

        Args:
            functions: `name` and `parameters` of each.
            form: of answers.
            thinks: see `json`.

        Raises:
            AscendSpeedError: see `json`.
        """
        numbers = range(len(functions))
        rules = [f"start: {' | '.join(f'call{number}' for number in numbers)}"]
        for number, one in zip(numbers, functions, strict=True):
            opened, closed = _around_arguments(form, str(one["name"]))
            arguments = _json_rule(one.get("parameters") or {"type": "object"})
            rules += [f"call{number}: {opened} arguments{number} {closed}", f"arguments{number}: {arguments}"]
        return self._of_lark(rules, form, thinks)

    def _of_lark(self, rules: Sequence[str], form: AnswerForm, thinks: bool) -> "GrammarConstraint":
        if form.is_in_channels:
            opened, message, end, start = (_piece(form, mark) for mark in (CHANNEL, MESSAGE, END, START))
            thought = f'thought: {opened} "analysis" {message} TEXT {end} {start} "assistant"'
            rules = [*rules, thought, r"TEXT: /(.|\n)*/"]
        grammar = self._matcher.grammar_from_lark("\n".join(rules) + "\n")
        matcher = self._matcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise AscendSpeedError(
                f"the form cannot be held to: {' '.join(matcher.get_error().split())[:300]}"
            )
        closed = form.thoughts[1]
        return GrammarConstraint(matcher, self._tokenizer, thinks, (closed, form.control.get(closed)))


def _piece(form: AnswerForm, mark: str) -> str:
    """Return a mark in a grammar: its id if it is control, its text otherwise."""
    return f"<[{form.control[mark]}]>" if mark in form.control else json.dumps(mark)


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITE_SPACE}})


def _around_arguments(form: AnswerForm, name: str) -> tuple[str, str]:
    """Return what stands before and after the arguments of a call."""
    if form.calls == "channels":
        opened, constrained, message = (_piece(form, mark) for mark in (CHANNEL, CONSTRAIN, MESSAGE))
        header = json.dumps(f"commentary to=functions.{name} ")
        return f'thought? {opened} {header} {constrained} "json" {message}', ""
    if form.calls == "named":
        return f"{_piece(form, LIST_MARK)} {json.dumps(name)} {_piece(form, ARGUMENTS_MARK)}", ""
    key = "parameters" if form.calls == "object" else "arguments"
    before = json.dumps(name).join(('{"name": ', f', "{key}": '))
    if form.calls == "object":
        return json.dumps(before), '"}"'
    if form.calls == "list":
        return f"{_piece(form, LIST_MARK)} {json.dumps(f' [{before}')}", '"}]"'
    opened, closed = (_piece(form, mark) for mark in CALL_MARKS)
    return f"{opened} {json.dumps(NEW_LINE + before)}", f'"}}\\n" {closed}'


class GrammarConstraint:
    """What the tokens of one text may be; see `TokenConstraint`.

    Args:
        matcher: of llguidance.
        tokenizer: decodes thoughts.
        thinks: whether the text begins inside of thoughts, which may be anything.
        closed: the mark that ends thoughts, and its id if it is control.
    """

    def __init__(
        self, matcher: Any, tokenizer: Tokenizer, thinks: bool, closed: tuple[str, int | None]
    ) -> None:
        self._matcher, self._tokenizer, self._thinks, self._closed = matcher, tokenizer, thinks, closed
        self._recent: list[int] = []

    @property
    def is_finished(self) -> bool:
        """Whether the form is complete, and nothing may follow."""
        return not self._thinks and bool(self._matcher.is_stopped())

    def allowed(self, vocab_size: int) -> torch.Tensor:
        """Return which tokens may follow, bool, [V]."""
        if self._thinks:
            return torch.ones(vocab_size, dtype=torch.bool)
        found = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (found.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        mask = bits.flatten()[:vocab_size].bool()
        if self._matcher.is_error() or not mask.any():
            raise AscendSpeedError(f"no token fits the form that was asked for: {self._matcher.get_error()}")
        return mask

    def take(self, token_id: int) -> None:
        """Go on to the state after a token."""
        if not self._thinks:
            self._matcher.consume_token(token_id)
            return
        self._recent = [*self._recent[1 - RECENT_TOKENS :], token_id]
        mark, number = self._closed
        self._thinks = token_id != number and mark not in self._tokenizer.decode(self._recent)


class _TokenBytes:
    """The bytes of every token, as llguidance asks for them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = end_id, tokenizer.bos_id
        size = min(tokenizer.vocab_size, vocab_size)
        names = tokenizer.convert_ids_to_tokens(range(size))
        spell: Callable[[str], bytes] = _sentencepiece_bytes
        if tokenizer.kind == "tokenizer.json" and not any(_BYTE_PIECE.fullmatch(one) for one in names):
            spell = _byte_level_bytes
        added = {number: name for name, number in tokenizer.added_ids.items()}
        self.tokens = [
            added[number].encode() if number in added else spell(name) for number, name in enumerate(names)
        ]
        self.tokens += [b""] * (vocab_size - size)
        nothing = {number for number, one in enumerate(self.tokens) if not one}
        self.special_token_ids = sorted({*tokenizer.special_ids.values(), end_id, *nothing})
        for number in nothing:
            # Every token has a name; special ones are never written as text.
            self.tokens[number] = f"<no text {number}>".encode()

    def __call__(self, text: str | bytes) -> list[int]:
        whole = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(whole, add_special_tokens=False)


def _sentencepiece_bytes(name: str) -> bytes:
    found = _BYTE_PIECE.fullmatch(name)
    return bytes([int(found[1], 16)]) if found else name.replace("\u2581", " ").encode("utf-8", "replace")


def _byte_level_bytes(name: str) -> bytes:
    table = _byte_level_table()
    return bytes(table[c] for c in name) if all(c in table for c in name) else name.encode("utf-8", "replace")


@cache
def _byte_level_table() -> dict[str, int]:
    """Return the byte that each character of a byte-level piece stands for (Radford et al., 2019, encoder.py)."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(others)}
