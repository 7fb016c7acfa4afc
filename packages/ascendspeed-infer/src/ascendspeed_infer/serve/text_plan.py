"""From the fields of a request to what the engine runs, and from its tokens to a text that grows."""

import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ascendspeed_infer.answer_form import AnswerReader
from ascendspeed_infer.detokenizer import Detokenizer
from ascendspeed_infer.engine.sequence import (
    FinishReason,
    GenerationSettings,
    SamplingRequest,
    TokenConstraint,
    TokenOutput,
    never_stop,
)
from ascendspeed_infer.sampling import SamplingParams
from ascendspeed_infer.serve.bodies import LARGEST_SEED, TextBody
from ascendspeed_infer.serve.errors import ApiError
from ascendspeed_infer.serve.served_model import ServedModel

LEAST_TEMPERATURE = 1e-6
"""Of draws; far below it, logits divided by it are infinite."""


def sampling_params(body: TextBody, vocab_size: int) -> SamplingParams:
    """Return how tokens are chosen; temperature 0 takes the likeliest one, no seed takes any.

    Raises:
        ApiError: a bias is of no token, or the temperature is too low.
    """
    temperature = 1.0 if body.temperature is None else body.temperature
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ApiError(
            f"temperature={temperature} is less than {LEAST_TEMPERATURE}; give 0 for the likeliest token",
            param="temperature",
        )
    seed = secrets.randbelow(LARGEST_SEED) if body.seed is None else body.seed
    return SamplingParams(
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=seed,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=_biases(body.logit_bias or {}, vocab_size),
    )


def _biases(given: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for name in given:
        if not (name.isascii() and name.isdecimal()) or int(name) >= vocab_size:
            raise ApiError(f"logit_bias: {name[:40]!r} is no id in 0 to {vocab_size - 1}", param="logit_bias")
    return tuple((int(name), value) for name, value in given.items())


def check_text_body(served: ServedModel, body: TextBody, num_texts: int) -> None:
    """Raise `ApiError` for what the server does not allow."""
    limits = served.limits
    served.adapter_named(body.model)
    if num_texts > limits.max_choices:
        raise ApiError(
            f"{num_texts} texts were asked for, more than the {limits.max_choices} allowed", param="n"
        )
    if len(body.stops) > limits.max_stop:
        raise ApiError(
            f"{len(body.stops)} stop strings are more than the {limits.max_stop} allowed", param="stop"
        )
    longest = max(map(len, body.stops), default=0)
    if longest > limits.max_stop_characters:
        raise ApiError(
            f"a stop string of {longest} characters is longer than the {limits.max_stop_characters} allowed",
            param="stop",
        )
    if "" in body.stops:
        raise ApiError("stop holds an empty text, which would end every answer; leave it out", param="stop")
    if body.stream_options is not None and not body.stream:
        raise ApiError("stream_options is for stream=true; leave it out", param="stream_options")


def check_log_probs(served: ServedModel, count: int, param: str) -> None:
    """Raise `ApiError` if more alternatives were asked for than are allowed."""
    if count > served.limits.max_logprobs:
        raise ApiError(f"{param}={count} is more than the {served.limits.max_logprobs} allowed", param=param)


def usage(num_prompt: int, num_new: int, num_cached: int) -> dict[str, Any]:
    """Return counts of tokens in OpenAI's form.

    Args:
        num_prompt: of the prompts.
        num_new: of the answers.
        num_cached: of the prompts, copied from earlier texts.
    """
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


async def grow(
    served: ServedModel, texts: Sequence["GrowingText"], num_prompt_tokens: int, model: str | None
) -> AsyncGenerator[tuple[int, str, Sequence[TokenOutput]], None]:
    """Run the engine until all texts are complete; yield the number of a text, what was added to it, and its tokens.

    Args:
        served: the model.
        texts: new ones.
        num_prompt_tokens: to be counted.
        model: that the request named.
    """
    started, is_first, metrics = time.perf_counter(), True, served.metrics
    metrics.prompt_tokens.inc(num_prompt_tokens)
    adapter = served.adapter_named(model)
    async with aclosing(served.run([one.new_request() for one in texts], adapter)) as running:
        async for number, output in running:
            if is_first:
                metrics.first_token_seconds.observe(time.perf_counter() - started)
                is_first = False
            metrics.completion_tokens.inc(len(output.new_tokens))
            yield number, texts[number].add(output.new_tokens), output.new_tokens
    metrics.request_seconds.observe(time.perf_counter() - started)


@dataclass
class GrowingText:
    """One answer: what the engine runs for it, and what it has so far.

    Attributes:
        prompt_ids: before it.
        settings: how it is continued.
        tokens: new ones.
        text: of them, as far as it is certain.
        constraint: what its tokens may be.
        reader: puts marks of thoughts and calls into its text, where they are control.
        shown_length: characters of the tokens whose log-probabilities were shown.
    """

    served: ServedModel
    prompt_ids: Sequence[int]
    settings: GenerationSettings
    constraint: TokenConstraint | None = None
    reader: AnswerReader | None = None
    tokens: list[TokenOutput] = field(default_factory=list)
    text: str = ""
    shown_length: int = 0

    def __post_init__(self) -> None:
        self._detokenizer = self._new_detokenizer()
        self._ids: list[int] = []
        self._request: SamplingRequest | None = None
        self._control = frozenset(self.served.model.tokenizer.special_ids.values()) if self.reader else ()

    def new_request(self) -> SamplingRequest:
        """Return the request of the engine."""
        # The check runs on the engine's thread, with a detokenizer of its own.
        check = self._new_detokenizer().has_stop_string if self.settings.stop else never_stop
        self._request = SamplingRequest(self.prompt_ids, self.settings, check, self.constraint)
        return self._request

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompt whose keys and values were copied from an earlier text."""
        return 0 if self._request is None else self._request.num_cached_tokens

    def add(self, tokens: Sequence[TokenOutput]) -> str:
        """Take new tokens and return what they add to the text."""
        self.tokens += tokens
        if self.reader is None:
            self._ids += (one.token_id for one in tokens)
            added = self._detokenizer.next_text(self._ids, self.finish_reason is not None)
        else:
            added = "".join(self._read(self.reader, one) for one in tokens)
        self.text += added
        return added

    def _read(self, reader: AnswerReader, token: TokenOutput) -> str:
        self._ids.append(token.token_id)
        # No stop string goes on behind control, so nothing is held back there.
        is_certain = token.finish_reason is not None or token.token_id in self._control
        added = reader.feed(token.token_id, self._detokenizer.next_text(self._ids, is_certain))
        return added + (reader.end() if token.finish_reason == "stop" else "")

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended."""
        return self.tokens[-1].finish_reason if self.tokens else None

    @property
    def mean_log_prob(self) -> float:
        """Of its tokens, for the choice of the best."""
        return sum(one.log_prob or 0.0 for one in self.tokens) / max(len(self.tokens), 1)

    def _new_detokenizer(self) -> Detokenizer:
        own = self.settings
        return Detokenizer(self.served.model.tokenizer, self.prompt_ids, own.eos_token_ids, own.stop)
