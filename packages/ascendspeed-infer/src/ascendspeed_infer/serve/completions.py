"""`/v1/completions`: continue texts, and say how likely tokens are."""

import math
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ascendspeed_infer.engine.prompt_request import PromptRequest
from ascendspeed_infer.engine.sequence import GenerationSettings, TokenOutput
from ascendspeed_infer.serve.bodies import CompletionBody
from ascendspeed_infer.serve.errors import ApiError
from ascendspeed_infer.serve.log_probs import completion_log_probs
from ascendspeed_infer.serve.served_model import ServedModel
from ascendspeed_infer.serve.text_plan import (
    GrowingText,
    check_log_probs,
    check_text_body,
    grow,
    sampling_params,
    usage,
)

DEFAULT_MAX_TOKENS = 16
"""Of OpenAI's API."""

Json = dict[str, Any]


class CompletionCall:
    """One request.

    Args:
        served: the model.
        body: what was asked.

    Raises:
        ApiError: what was asked cannot be done; nothing was computed.
    """

    def __init__(self, served: ServedModel, body: CompletionBody) -> None:
        self.served, self.body = served, body
        self._prompts = [served.encode(prompt) for prompt in body.prompts]
        if not all(self._prompts):
            raise ApiError(
                "the prompt has no token and the tokenizer adds none; give a text to continue", param="prompt"
            )
        self._n = body.n or 1
        self._best_of = body.best_of or self._n
        self._max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        self._check()
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": body.model or served.name,
        }
        self._prompt_tokens: list[list[TokenOutput]] = [[] for _ in self._prompts]
        self._texts = self._new_texts()
        self._echoed = [served.model.tokenizer.decode(ids) if body.echo else "" for ids in self._prompts]

    async def answer(self) -> Json:
        """Return the whole answer."""
        await self._score_prompts()
        async with aclosing(self._grow()) as growing:
            async for _ in growing:
                pass
        choices: list[Json] = []
        for number in range(len(self._prompts)):
            for text in self._chosen(self._texts[number * self._best_of : (number + 1) * self._best_of]):
                choices.append(
                    self._choice(
                        len(choices), number, text, text.text, text.tokens, is_first=True, is_last=True
                    )
                )
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[Json, None]:
        """Yield the answer as it grows, one object for each piece."""
        await self._score_prompts()
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        more: Json = {"usage": None} if with_usage else {}
        begun = set[int]()
        if self._max_tokens == 0:
            for index, text in enumerate(self._texts):
                yield {
                    **self._head,
                    "choices": [self._choice(index, index // self._n, text, "", [], True, True)],
                    **more,
                }
        async with aclosing(self._grow()) as growing:
            async for index, added, tokens in growing:
                text = self._texts[index]
                is_last = text.finish_reason is not None
                choice = self._choice(
                    index, index // self._n, text, added, tokens, index not in begun, is_last
                )
                begun.add(index)
                yield {**self._head, "choices": [choice], **more}
        if with_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    def _check(self) -> None:
        body, served = self.body, self.served
        if not self._prompts:
            raise ApiError("prompt is an empty list; give a text, or ids", param="prompt")
        check_text_body(served, body, len(self._prompts) * self._best_of)
        check_log_probs(served, body.logprobs or 0, "logprobs")
        if self._best_of < self._n:
            raise ApiError(f"best_of={self._best_of} is less than n={self._n}; give more", param="best_of")
        if body.stream and self._best_of > self._n:
            raise ApiError("best_of is known at the end only, so it cannot be streamed", param="best_of")
        # A prompt that is only scored may be longer by its last token, which the model does not read.
        is_scored = self._max_tokens == 0 and bool(body.echo) and body.logprobs is not None
        for ids in self._prompts:
            served.check_length(len(ids) - (is_scored and len(ids) > 1), self._max_tokens)

    def _new_texts(self) -> list[GrowingText]:
        """Return the answers, `best_of` of each prompt; draws of one prompt have seeds that follow."""
        body, model = self.body, self.served.model
        sampling = sampling_params(body, model.engine.vocab_size)
        settings = GenerationSettings(
            max(self._max_tokens, 1),
            sampling,
            () if body.ignore_eos else model.eos_token_ids(),
            body.stops,
            return_log_probs=body.logprobs is not None or self._best_of > self._n,
            num_top_log_probs=body.logprobs or 0,
        )
        return [
            GrowingText(
                self.served, ids, replace(settings, sampling=replace(sampling, seed=sampling.seed + number))
            )
            for ids in self._prompts
            for number in range(self._best_of)
        ]

    async def _score_prompts(self) -> None:
        """Find the log-probabilities of the tokens of prompts, if they are to be shown."""
        if not self.body.echo or self.body.logprobs is None:
            return
        shapes = self.served.driver.engine.shapes
        numbers = [number for number, ids in enumerate(self._prompts) if len(ids) > 1]
        requests = [PromptRequest(self._prompts[one], self.body.logprobs, shapes) for one in numbers]
        if requests:
            async with aclosing(
                self.served.run(requests, self.served.adapter_named(self.body.model))
            ) as running:
                async for _ in running:
                    pass
        for number, request in zip(numbers, requests, strict=True):
            if not all(math.isfinite(one.log_prob or 0.0) for one in request.tokens):
                raise ApiError(
                    "the log-probability of a token of the prompt is not finite", 500, kind="server_error"
                )
            self._prompt_tokens[number] = request.tokens

    def _grow(self) -> AsyncGenerator[tuple[int, str, Sequence[TokenOutput]], None]:
        """See `grow`."""
        texts = self._texts if self._max_tokens else []
        return grow(self.served, texts, sum(map(len, self._prompts)), self.body.model)

    def _chosen(self, texts: Sequence[GrowingText]) -> list[GrowingText]:
        """Return the `n` texts with the highest log-probability per token."""
        if self._best_of == self._n:
            return list(texts)
        return sorted(texts, key=lambda one: -one.mean_log_prob)[: self._n]

    def _choice(
        self,
        index: int,
        prompt_number: int,
        text: GrowingText,
        added: str,
        tokens: Sequence[TokenOutput],
        is_first: bool,
        is_last: bool,
    ) -> Json:
        """Return a piece of an answer; the first one begins with the prompt, with `echo`."""
        ids, echoed = self._prompts[prompt_number], self._echoed[prompt_number]
        finish = text.finish_reason or ("length" if self._max_tokens == 0 else None)
        choice: Json = {
            "index": index,
            "text": (echoed if is_first else "") + added,
            "logprobs": None,
            "finish_reason": finish if is_last else None,
        }
        if self.body.logprobs is not None:
            with_prompt = bool(self.body.echo) and is_first
            shown = [*(self._prompt_tokens[prompt_number] if with_prompt else []), *tokens]
            start = (
                [] if with_prompt else [*ids, *(one.token_id for one in text.tokens[: -len(tokens) or None])]
            )
            choice["logprobs"], text.shown_length = completion_log_probs(
                self.served.model.tokenizer,
                start,
                [TokenOutput(ids[0], None, None), *shown] if with_prompt else shown,
                text.shown_length,
            )
        if self.body.return_token_ids:
            choice["token_ids"] = [one.token_id for one in tokens]
            if is_first:
                choice["prompt_token_ids"] = ids
        return choice

    def _usage(self) -> Json:
        prompt = sum(map(len, self._prompts))
        new = sum(len(one.tokens) for one in self._texts)
        cached = sum(
            max(one.num_cached_tokens for one in self._texts[start : start + self._best_of])
            for start in range(0, len(self._texts), self._best_of)
        )
        return usage(prompt, new, cached)
