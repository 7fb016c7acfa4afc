"""Text, a tokenizer and datasets made on the spot."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ascendspeed_data.indexed import IndexedDatasetWriter

WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they "
    "which one you were all her she there would their we him been has when who will no more if out so up said what "
    "its about than into them can only other time new some could these two may first then do any like my now over "
    "such our man me even most made after also did many off before must well back through years much where your way"
).split()

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_texts(count: int = 200, seed: int = 1) -> list[str]:
    """Texts of 5 to 60 words with numbers, accents and Chinese characters strewn in."""
    draw = random.Random(seed)
    extra = ["Zürich", "café", "中文", "字符", "x = f(y)", "  two  spaces ", "\n\n", "1984", "🙂"]
    texts = []
    for _ in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(5, 60))]
        words.insert(draw.randrange(len(words)), draw.choice(extra))
        texts.append(" ".join(words))
    return texts


def write_json_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_dataset(prefix: Path, vocab_size: int, documents: int = 60, seed: int = 0) -> Path:
    """A dataset of random ids without a manifest; successive ids are related, so a model can learn them."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(5, 80, documents).tolist()
    steps = generator.integers(1, 4, sum(lengths))
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_documents(lengths, (np.cumsum(steps) % vocab_size).astype(np.uint16))
        writer.finish()
    return prefix


def make_chat_tokenizer(folder: Path) -> Any:
    """Save a byte-level tokenizer of 600 ids with ChatML's template, and return it as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made.train_from_iterator(
        make_texts(400),
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return tokenizer
