"""Prompts and options of generation, and its results."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from ascendspeed_data.tokenizer import Tokenizer
from ascendspeed_infer.beams import EarlyStopping
from ascendspeed_infer.engine.sequence import FinishReason

Prompts = str | Sequence[int] | Sequence[str | Sequence[int]]
"""A text, its ids, or several of either."""


@dataclass(frozen=True)
class Completion:
    """A continued text.

    Attributes:
        prompt: as given; of ids their text.
        text: what follows it, without end ids and stop strings; after the prompt if `echo` was given.
        token_ids: the new ids.
        finish_reason: `stop` when the text ended by itself, `length` when the limit was reached.
        prompt_token_ids: ids of the prompt.
        log_probs: natural logarithm of the probability that the model gives each new id, before temperature, filters
            and penalty; if `return_log_probs` was given.
        score: of a text found by beam search, that of transformers: the sum of its log-probabilities over its length
            to the power of `length_penalty`.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None = None
    score: float | None = None


@dataclass(frozen=True)
class StreamedText:
    """What one more token added to a text.

    Attributes:
        text: the new characters; empty while a character is incomplete or could begin a stop string.
        token_id: the token.
        log_prob: of it, if `return_log_probs` was given.
        finish_reason: with the last token.
    """

    text: str
    token_id: int
    log_prob: float | None
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, and how it is continued.

    Attributes:
        prompt: text, or its ids.
        max_new_tokens: most new tokens.
        stop: strings that end it.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn.
        seed: seed of the draws.
        end_ids: ids that end it, besides those of the model.
    """

    prompt: str | tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 1234
    end_ids: tuple[int, ...] = ()

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of the prompt."""
        return tokenizer.encode(self.prompt) if isinstance(self.prompt, str) else list(self.prompt)


class GenerateOptions(TypedDict, total=False):
    """Options of `LanguageModel.generate`: the fields of `SamplingConfig`, where each is explained with its default.

    The last six are names of 2023; see `legacy_options`.
    """

    max_new_tokens: int
    max_length: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    num_beams: int
    length_penalty: float
    early_stopping: EarlyStopping
    num_return_sequences: int
    seed: int
    stop: str | Sequence[str]
    eos_token_ids: int | Sequence[int]
    ignore_eos: bool
    parse_special: bool
    return_log_probs: bool
    echo: bool
    detokenize: bool
    batch_size: int
    batch_invariant: bool
    include_input: bool
    return_output_log_probs: bool
    eos_token_id: int | Sequence[int]
    recompute: bool
    bos_token_id: int
    pad_token_id: int
