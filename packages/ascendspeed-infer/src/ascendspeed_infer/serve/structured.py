"""Answers of a given form: JSON, JSON of a schema, or a call of a tool, by a grammar over tokens (llguidance)."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.thinking import CLOSE
from ascendspeed_infer.tool_calls import CALL_MARKS

WHITE_SPACE = r"[\x20\x0A\x0D\x09]{0,40}"
"""Between the parts of JSON: some, so that a model does not write it for ever."""
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

    def json(self, schema: Mapping[str, Any], thinks: bool) -> "GrammarConstraint":
        """Return what holds a text to JSON.

        Args:
            schema: JSON Schema of the value.
            thinks: whether the prompt opened thoughts, after whose end the JSON begins.

        Raises:
            AscendSpeedError: the schema is wrong, or says something that cannot be held to.
        """
        options: Any = {"whitespace_pattern": WHITE_SPACE}
        grammar = self._matcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
        return self._constraint(grammar, thinks)

    def tool_call(self, functions: Sequence[Mapping[str, Any]], thinks: bool) -> "GrammarConstraint":
        """Return what holds a text to one call of one of some functions.

        Args:
            functions: `name` and `parameters` of each.
            thinks: see `json`.

        Raises:
            AscendSpeedError: see `json`.
        """
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": one["name"]},
                    "arguments": one.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for one in functions
        ]
        schema = json.dumps({"x-guidance": {"whitespace_pattern": WHITE_SPACE}, "anyOf": calls})
        opened, closed = (json.dumps(mark) for mark in (f"{CALL_MARKS[0]}\n", f"\n{CALL_MARKS[1]}"))
        lark = f"start: {opened} call {closed}\ncall: %json {schema}\n"
        return self._constraint(self._matcher.grammar_from_lark(lark), thinks)

    def _constraint(self, grammar: str, thinks: bool) -> "GrammarConstraint":
        matcher = self._matcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise AscendSpeedError(
                f"the form cannot be held to: {' '.join(matcher.get_error().split())[:300]}"
            )
        return GrammarConstraint(matcher, self._tokenizer, thinks)


class GrammarConstraint:
    """What the tokens of one text may be; see `TokenConstraint`.

    Args:
        matcher: of llguidance.
        tokenizer: decodes thoughts.
        thinks: whether the text begins inside of thoughts, which may be anything.
    """

    def __init__(self, matcher: Any, tokenizer: Tokenizer, thinks: bool) -> None:
        self._matcher, self._tokenizer, self._thinks = matcher, tokenizer, thinks
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
        self._thinks = CLOSE not in self._tokenizer.decode(self._recent)


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
