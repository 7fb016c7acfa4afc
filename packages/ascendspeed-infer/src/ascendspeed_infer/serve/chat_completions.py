"""`/v1/chat/completions`: answer conversations in the layout of the checkpoint."""

import re
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_data.fields import message_key
from ascendspeed_data.prompting import PromptLayout
from ascendspeed_infer.answer_form import FORM_NAMES, AnswerForm
from ascendspeed_infer.engine.sequence import GenerationSettings, TokenConstraint, TokenOutput
from ascendspeed_infer.serve.answer_parser import AnswerParser, AnswerPart
from ascendspeed_infer.serve.bodies import ChatBody, ToolChoice
from ascendspeed_infer.serve.errors import ApiError
from ascendspeed_infer.serve.log_probs import chat_log_probs
from ascendspeed_infer.serve.served_model import ServedModel
from ascendspeed_infer.serve.text_plan import (
    GrowingText,
    check_log_probs,
    check_text_body,
    grow,
    sampling_params,
    usage,
)

Json = dict[str, Any]
EFFORT = "reasoning_effort"
"""Field of a request, and variable of the chat templates that read it."""


FUNCTION_NAME = re.compile(r"[\w.-]{1,128}")


OF_MESSAGES = frozenset(
    message_key(name) for name in ("name", "tool_call_id", "refusal", "annotations", "audio", "id")
)
"""OpenAI's keys of messages: clients send them, also where the chat template does not read them."""


class ChatCall:
    """One request.

    Args:
        served: the model.
        body: what was asked.

    Raises:
        ApiError: what was asked cannot be done; nothing was computed.
    """

    def __init__(self, served: ServedModel, body: ChatBody) -> None:
        self.served, self.body = served, body
        self._n = body.n or 1
        check_text_body(served, body, self._n)
        check_log_probs(served, body.top_logprobs or 0, "top_logprobs")
        if body.top_logprobs and not body.logprobs:
            raise ApiError("top_logprobs is for logprobs=true", param="top_logprobs")
        layout = self._layout()
        self._form = AnswerForm.of(layout.sources, served.model.tokenizer)
        if self._has_tools:
            _check_tools(body.tools or [])
        if self._has_tools and self._form.calls is None:
            raise ApiError(
                f"calls of tools are read in the forms of {FORM_NAMES}, of which the chat template has none; leave "
                "tools out",
                param="tools",
            )
        try:
            self._ids, unused = layout.ids_and_unused(body.messages)
        except AscendSpeedError as error:
            raise ApiError(str(error), param="messages") from None
        _check_unused(served, unused)
        self._thinks = self._form.opens_thoughts(served.model.tokenizer, self._ids)
        self._texts = self._new_texts(layout)
        self._parsers = [
            AnswerParser(self._thinks, self._has_tools, body.tools, self._form.thoughts) for _ in self._texts
        ]
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": body.model or served.name,
        }

    async def answer(self) -> Json:
        """Return the whole answer."""
        parts: list[list[AnswerPart]] = [[] for _ in self._texts]
        async with aclosing(grow(self.served, self._texts, len(self._ids), self.body.model)) as growing:
            async for index, added, tokens in growing:
                parts[index].append(self._parse(index, added, len(tokens)))
        choices = []
        for index, own in enumerate(parts):
            calls = [
                {key: call[key] for key in ("id", "type", "function")} for one in own for call in one.calls
            ]
            content, reasoning = "".join(one.content for one in own), "".join(one.reasoning for one in own)
            message: Json = {
                "role": "assistant",
                "content": None if calls and not content.strip() else content,
            }
            if reasoning:
                message["reasoning_content"] = reasoning
            if calls:
                message["tool_calls"] = calls
            choice = {"index": index, "message": message, "finish_reason": self._finish_reason(index)}
            choices.append(choice | self._details(index, self._texts[index].tokens))
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[Json, None]:
        """Yield the answer as it grows, one object for each piece."""
        options = self.body.stream_options
        with_usage = options is not None and options.include_usage
        more: Json = {"usage": None} if with_usage else {}
        begun = set[int]()
        async with aclosing(grow(self.served, self._texts, len(self._ids), self.body.model)) as growing:
            async for index, added, tokens in growing:
                part = self._parse(index, added, len(tokens))
                delta: Json = {} if index in begun else {"role": "assistant", "content": ""}
                begun.add(index)
                if part.reasoning:
                    delta["reasoning_content"] = part.reasoning
                if part.content:
                    delta["content"] = part.content
                if part.calls:
                    delta["tool_calls"] = part.calls
                choice = {"index": index, "delta": delta, "finish_reason": self._finish_reason(index)}
                choice |= self._details(index, tokens)
                yield {**self._head, "choices": [choice], **more}
        if with_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}

    @property
    def _has_tools(self) -> bool:
        return bool(self.body.tools) and self.body.tool_choice != "none"

    def _layout(self) -> PromptLayout:
        layout = (self.served.layout_for_tools if self._has_tools else None) or self.served.layout
        if layout is None:
            raise ApiError("the model has no chat template; use /v1/completions", param="messages")
        variables, effort = self.body.chat_template_kwargs or {}, self.body.reasoning_effort
        if effort is not None:
            if EFFORT not in layout.reads:
                raise ApiError(
                    f"{EFFORT} is not read by the model's chat template; leave it out", param=EFFORT
                )
            variables = {EFFORT: effort, **variables}
        if not self._has_tools and not variables:
            return layout
        try:
            return layout.with_tools(self.body.tools if self._has_tools else None, variables)
        except AscendSpeedError as error:
            raise ApiError(str(error), param="chat_template_kwargs" if variables else "tools") from None

    def _new_texts(self, layout: PromptLayout) -> list[GrowingText]:
        """Return the answers; draws have seeds that follow."""
        body, model, engine = self.body, self.served.model, self.served.driver.engine
        asked = body.max_completion_tokens or body.max_tokens
        if body.max_tokens == 0:
            raise ApiError("max_tokens=0 leaves no answer; give more", param="max_tokens")
        longest = min(engine.max_model_len, self.served.cache_tokens) - len(self._ids)
        max_tokens = max(longest, 1) if asked is None else asked
        self.served.check_length(len(self._ids), max_tokens)
        sampling = sampling_params(body, model.engine.vocab_size)
        ends = () if body.ignore_eos else tuple(dict.fromkeys((*model.eos_token_ids(), *layout.end_ids)))
        settings = GenerationSettings(
            max_tokens,
            sampling,
            ends,
            (*body.stops, *layout.stop),
            return_log_probs=bool(body.logprobs),
            num_top_log_probs=body.top_logprobs or 0,
        )
        return [
            GrowingText(
                self.served,
                self._ids,
                replace(settings, sampling=replace(sampling, seed=sampling.seed + number)),
                self._constraint(),
                self._form.reader(model.tokenizer),
            )
            for number in range(self._n)
        ]

    def _constraint(self) -> TokenConstraint | None:
        """Return what holds an answer to the form that was asked for."""
        body, grammars = self.body, self.served.grammars
        schema = None if body.response_format is None else body.response_format.wanted
        functions = self._functions_to_call()
        try:
            if functions:
                return grammars().tool_call(functions, self._form, self._thinks)
            return None if schema is None else grammars().json(schema, self._form, self._thinks)
        except AscendSpeedError as error:
            raise ApiError(str(error), param="tools" if functions else "response_format") from None

    def _functions_to_call(self) -> list[Json]:
        """Return the functions of which one must be called; none if the model decides."""
        body, choice = self.body, self.body.tool_choice
        is_forced = isinstance(choice, ToolChoice) or choice == "required"
        if body.parallel_tool_calls is False and self._has_tools and not is_forced:
            raise ApiError(
                "parallel_tool_calls=false needs tool_choice required or a function",
                param="parallel_tool_calls",
            )
        if not is_forced:
            return []
        functions = [one["function"] for one in body.tools or []]
        if isinstance(choice, ToolChoice):
            functions = [one for one in functions if one["name"] == choice.function.name]
        if not functions:
            raise ApiError("tool_choice asks for a function that tools does not have", param="tool_choice")
        return functions

    def _parse(self, index: int, added: str, num_tokens: int) -> AnswerPart:
        return self._parsers[index].feed(added, self._texts[index].finish_reason is not None, num_tokens)

    def _finish_reason(self, index: int) -> str | None:
        reason = self._texts[index].finish_reason
        return "tool_calls" if reason == "stop" and self._parsers[index].num_calls else reason

    def _details(self, index: int, tokens: Sequence[TokenOutput]) -> Json:
        """Return log-probabilities and ids of a part of an answer, if they were asked for."""
        found: Json = {"logprobs": None}
        if self.body.logprobs:
            own = self._texts[index].tokens
            before = [*self._ids, *(one.token_id for one in own[: len(own) - len(tokens)])]
            found["logprobs"] = chat_log_probs(self.served.model.tokenizer, before, tokens)
        if self.body.return_token_ids:
            found["token_ids"] = [one.token_id for one in tokens]
        return found

    def _usage(self) -> Json:
        new = sum(len(one.tokens) for one in self._texts)
        thought = sum(one.num_reasoning_tokens for one in self._parsers)
        counts = usage(len(self._ids), new, max(one.num_cached_tokens for one in self._texts))
        return counts | {"completion_tokens_details": {"reasoning_tokens": thought}}


def _check_tools(tools: Sequence[Json]) -> None:
    """Raise `ApiError` unless each tool is a function with a name, and parameters, if any, that are an object."""
    for number, tool in enumerate(tools, 1):
        function: Any = tool.get("function") if tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
            raise ApiError(
                f"tools: number {number} is not of the type function with a name of letters, digits, '_', '.' and '-'",
                param="tools",
            )
        if not isinstance(function.get("parameters") or {}, dict):
            raise ApiError(f"tools: the parameters of {name} are not an object", param="tools")


def _check_unused(served: ServedModel, unused: Sequence[str]) -> None:
    for name in unused:
        if name in OF_MESSAGES:
            continue
        if not served.limits.lenient:
            raise ApiError(
                f"{name[:80]} is not read by the chat template, so it has no effect; leave it out",
                param="messages",
            )
        served.say(f"a request has the {name[:80]}, which the chat template does not read")
