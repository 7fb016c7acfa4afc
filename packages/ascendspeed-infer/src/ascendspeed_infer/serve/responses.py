"""`/v1/responses` in its basic form: a conversation in, messages and calls of tools out; nothing is stored."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from pydantic import Field, ValidationError

from ascendspeed_infer.serve.bodies import Body, ChatBody, ResponseFormat
from ascendspeed_infer.serve.chat_completions import ChatCall
from ascendspeed_infer.serve.completions import Json
from ascendspeed_infer.serve.errors import ApiError
from ascendspeed_infer.serve.served_model import ServedModel

TEXT_PARTS = ("input_text", "output_text", "text")


class TextFormat(Body):
    """The form of an answer, flat as this API has it."""

    ignored = Body.ignored | {"description", "strict"}
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(Body):
    """How texts are written."""

    format: TextFormat | None = None


class ReasoningOptions(Body):
    """How long a model thinks."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"summary": (), "generate_summary": ()}
    effort: str | None = None


class ResponsesBody(Body):
    """Of `/v1/responses`."""

    ignored = Body.ignored | {"service_tier", "prompt_cache_key", "include"}
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "truncation": ("disabled",),
        "prompt": (),
        "max_tool_calls": (),
    }
    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = None
    stream: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class ResponsesCall:
    """One request: a chat completion in another form.

    Args:
        served: the model.
        body: what was asked.

    Raises:
        ApiError: what was asked cannot be done; nothing was computed.
    """

    def __init__(self, served: ServedModel, body: ResponsesBody) -> None:
        self.body = body
        self._chat = ChatCall(served, _chat_body(body))
        self._head: Json = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": body.model or served.name,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "tools": body.tools or [],
            "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "metadata": {},
            "error": None,
        }
        self._message_id = f"msg_{secrets.token_hex(12)}"

    async def answer(self) -> Json:
        """Return the whole answer."""
        found = await self._chat.answer()
        (choice,) = found["choices"]
        message = choice["message"]
        return self._whole(
            message.get("reasoning_content", ""),
            message["content"] or "",
            message.get("tool_calls", []),
            choice["finish_reason"],
            found["usage"],
        )

    async def events(self) -> AsyncGenerator[Json, None]:
        """Yield the answer as it grows, each event with its name as `type`."""
        number = 0

        def event(kind: str, **more: Any) -> Json:
            nonlocal number
            number += 1
            return {"type": f"response.{kind}", "sequence_number": number - 1, **more}

        begun = {**self._head, "status": "in_progress", "output": [], "usage": None}
        reasoning, content, reason = "", "", None
        calls: list[Json] = []
        usage: Json = {}
        async with aclosing(self._chat.events()) as pieces:
            async for piece in pieces:
                if not number:
                    # Only now is it known that the engine took the request.
                    yield event("created", response=begun)
                    yield event("in_progress", response=begun)
                usage = piece.get("usage") or usage
                for choice in piece["choices"]:
                    delta, reason = choice["delta"], choice["finish_reason"] or reason
                    reasoning += delta.get("reasoning_content", "")
                    calls += delta.get("tool_calls", [])
                    added = delta.get("content", "")
                    where = {
                        "item_id": self._message_id,
                        "output_index": int(bool(reasoning)),
                        "content_index": 0,
                    }
                    if added and not content:
                        item = {**self._message("", "in_progress"), "content": []}
                        yield event("output_item.added", output_index=where["output_index"], item=item)
                        yield event("content_part.added", **where, part=_text_part(""))
                    if added:
                        content += added
                        yield event("output_text.delta", **where, delta=added, logprobs=[])
        whole = self._whole(reasoning, content, calls, reason, usage)
        for index, item in enumerate(whole["output"]):
            if item["type"] == "message":
                where = {"item_id": self._message_id, "output_index": index, "content_index": 0}
                yield event("output_text.done", **where, text=content, logprobs=[])
                yield event("content_part.done", **where, part=_text_part(content))
            else:
                yield event("output_item.added", output_index=index, item=item)
            yield event("output_item.done", output_index=index, item=item)
        yield event("completed" if whole["status"] == "completed" else "incomplete", response=whole)

    def _message(self, text: str, status: str) -> Json:
        content = [_text_part(text)]
        return {
            "type": "message", "id": self._message_id, "status": status, "role": "assistant", "content": content,
        }  # fmt: skip

    def _whole(
        self, reasoning: str, content: str, calls: list[Json], reason: str | None, usage: Json
    ) -> Json:
        status = "incomplete" if reason == "length" else "completed"
        output: list[Json] = []
        if reasoning:
            parts = [{"type": "reasoning_text", "text": reasoning}]
            output.append(
                {"type": "reasoning", "id": f"rs_{secrets.token_hex(12)}", "summary": [], "content": parts}
            )
        if content or not calls:
            output.append(self._message(content, status))
        for call in calls:
            function = call["function"]
            output.append(
                {
                    "type": "function_call",
                    "id": f"fc_{secrets.token_hex(12)}",
                    "call_id": call["id"],
                    "name": function["name"],
                    "arguments": function["arguments"],
                    "status": "completed",
                }
            )
        counts = {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": usage["completion_tokens_details"],
            "total_tokens": usage["total_tokens"],
        }
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            **self._head,
            "status": status,
            "output": output,
            "usage": counts,
            "incomplete_details": details,
        }


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": []}


def _chat_body(body: ResponsesBody) -> ChatBody:
    """Return the same request as one of a chat."""
    given = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages = [_message(item) for item in given]
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    if not messages:
        raise ApiError("input is empty; give a message", param="input")
    fields: Json = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "stream": body.stream,
        "stream_options": {"include_usage": True} if body.stream else None,
        "tools": None if body.tools is None else [_tool(one) for one in body.tools],
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
    }
    form = body.text.format if body.text is not None else None
    if form is not None:
        schema = {"name": form.name, "schema": form.json_schema} if form.json_schema is not None else None
        try:
            ResponseFormat.model_validate({"type": form.type, "json_schema": schema})
        except ValueError:
            raise ApiError(
                "text.format: schema is for the type json_schema, and needed there", param="text"
            ) from None
        fields["response_format"] = {"type": form.type, "json_schema": schema}
    try:
        return ChatBody.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ApiError(
            f"{first['loc'][0] if first['loc'] else 'input'}: {first['msg']}", param="input"
        ) from None


def _message(item: Json) -> Json:
    """Return an item of the input as a message of a chat."""
    kind = item.get("type", "message")
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind != "message":
        raise ApiError(
            f"input: items of the type {str(kind)[:40]!r} are not supported; leave them out", param="input"
        )
    content, role = item.get("content"), item.get("role")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") in TEXT_PARTS for part in content):
            raise ApiError(
                f"input: parts of a message are of the types {', '.join(TEXT_PARTS)}", param="input"
            )
        content = [{"type": "text", "text": part.get("text")} for part in content]
    return {"role": "system" if role == "developer" else role, "content": content}


def _tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        raise ApiError("tools: only functions are supported; leave others out", param="tools")
    kept = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
    return {"type": "function", "function": kept}


def _choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise ApiError("tool_choice: give none, auto, required, or a function by name", param="tool_choice")
    return {"type": "function", "function": {"name": choice["name"]}}
