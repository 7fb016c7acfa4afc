"""Chat templates of many families, a tokenizer with all their pieces, and conversations drawn at random."""

import importlib.util
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from support.corpus import make_texts

CHATML_WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
FAMILIES = {
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
        "{{ m['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
        "{% endif %}{% endfor %}"
    ),
    "internlm2": CHATML_WITH_BOS,
    "yi": CHATML_WITH_BOS.replace("{{ bos_token }}", ""),
    "baichuan2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<reserved_106>' + m['content'] }}"
        "{% elif m['role'] == 'assistant' %}{{ '<reserved_107>' + m['content'] }}{% else %}{{ m['content'] }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"
    ),
    "glm4": (
        "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}{# <|assistant|> <|user|> <|observation|> #}"
    ),
}
"""Templates of families that trl has none of, as their models ship them."""

TAKES_LISTS_ONLY = ("idefics3", "smolvlm", "llava_next")
"""Templates that print nothing of a content that is text."""

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How the tokenizers of Llama 3 and Qwen split a text: line breaks at the end of a prompt are a word of their own."""

KINDS = ("plain", "system", "reasoning", "tools", "tool results", "multi-turn thinking", "mixed")
PLAIN_PIECES = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Pieces that tokenizers add without calling them special, as Qwen3's does."""

_PIECES = re.compile(
    r"<\|[a-z_\"]+>|<[a-z_\"]+\|>|<[|｜][^<>\n'\"{}]{1,40}[|｜]>|\[/?[A-Z_]{3,16}\]|\[gMASK\]|<sop>"
    r"|</?(?:think|tool_call|tool_response|start_of_turn|end_of_turn)>|<end_of_utterance>|<reserved_\d+>"
)
_WORDS = sorted({word for text in make_texts(60, seed=9) for word in re.findall(r"[a-z]{3,}", text)})


def templates() -> dict[str, tuple[str, str | None]]:
    """The original templates of trl and those of further families, each with its twin for training if there is one."""
    found = importlib.util.find_spec("trl")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent / "chat_templates"
    made: dict[str, tuple[str, str | None]] = {}
    for path in sorted(folder.glob("*.jinja")):
        twin = path.with_name(f"{path.stem}_training.jinja")
        if not path.stem.endswith("_training"):
            source = path.read_text(encoding="utf-8")
            own = source if re.search(r"\{%-?\s*generation", source) else None
            made[path.stem] = (source, twin.read_text(encoding="utf-8") if twin.exists() else own)
    return made | {name: (source, None) for name, source in FAMILIES.items()}


def make_tokenizer(folder: Path) -> Any:
    """Save a byte-level tokenizer that has the pieces of all templates, and return it as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(make_texts(400), trainer)
    pieces = dict.fromkeys(
        piece for source, twin in templates().values() for piece in _PIECES.findall(source + (twin or ""))
    )
    special = [one for one in ("<s>", "</s>", *pieces) if one not in (*PLAIN_PIECES, "<|endoftext|>")]
    made.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    made.add_tokens([AddedToken(one, special=False, normalized=False) for one in PLAIN_PIECES])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    return tokenizer


@dataclass(frozen=True)
class Drawn:
    """A conversation, and the texts that it holds."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    texts: list[str]

    @property
    def record(self) -> dict[str, Any]:
        """The record of a file."""
        return {"messages": self.messages} | ({"tools": self.tools} if self.tools else {})


class Draw:
    """Draws conversations."""

    def __init__(self, seed: object) -> None:
        self._draw = random.Random(str(seed))
        self._texts: list[str] = []

    def conversation(self, kind: str, as_lists: bool = False) -> Drawn:
        """Draw a conversation of a kind; every text in it occurs once."""
        self._texts = []
        draw = self._draw
        mixed = kind == "mixed"
        has_tools = kind in ("tools", "tool results") or (mixed and draw.random() < 0.5)
        thinks = kind in ("reasoning", "multi-turn thinking") or (mixed and draw.random() < 0.5)
        turns = {"plain": draw.randint(1, 3), "multi-turn thinking": draw.randint(2, 3)}.get(kind, 1)
        turns = draw.randint(1, 3) if mixed else turns
        messages: list[dict[str, Any]] = []
        if kind == "system" or (mixed and draw.random() < 0.5):
            messages.append({"role": "system", "content": self._text()})
        for turn in range(turns):
            messages.append({"role": "user", "content": self._text()})
            calls = has_tools and (not mixed or draw.random() < 0.6)
            if calls:
                count = draw.choice((1, 1, 2)) if kind != "tools" else 1
                messages.append(self._thinking(self._calls(f"{turn}", count), thinks))
                if kind == "tools":
                    continue
                messages += [
                    {"role": "tool", "tool_call_id": call["id"], "name": "weather", "content": self._text()}
                    for call in messages[-1]["tool_calls"]
                ]
            answer = {"role": "assistant", "content": self._text()}
            messages.append(self._thinking(answer, thinks and (not mixed or draw.random() < 0.7)))
        if as_lists:
            for message in messages:
                if isinstance(message.get("content"), str):
                    message["content"] = [{"type": "text", "text": message["content"]}]
        return Drawn(messages, [self._tool()] if has_tools else None, self._texts)

    def _text(self) -> str:
        text = " ".join(self._draw.choice(_WORDS) for _ in range(self._draw.randint(2, 4)))
        self._texts.append(f"{text} q{len(self._texts)}x")
        return self._texts[-1]

    def _thinking(self, message: dict[str, Any], thinks: bool) -> dict[str, Any]:
        return {**message, "reasoning_content": self._text()} if thinks else message

    def _calls(self, turn: str, count: int) -> dict[str, Any]:
        calls = [
            {
                "id": f"abcdefg{turn}{number}",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": self._text()}},
            }
            for number in range(count)
        ]
        return {"role": "assistant", "content": None, "tool_calls": calls}

    def _tool(self) -> dict[str, Any]:
        city = {"type": "string", "description": self._text()}
        parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
        return {
            "type": "function",
            "function": {"name": "weather", "description": self._text(), "parameters": parameters},
        }


def in_wire_form(drawn: Drawn) -> Drawn:
    """The same conversation with arguments and tools as JSON text, as OpenAI's API and trl write them."""
    messages = json.loads(json.dumps(drawn.messages))
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    tools: Any = json.dumps(drawn.tools) if drawn.tools else None
    return Drawn(messages, tools, drawn.texts)
