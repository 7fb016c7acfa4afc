"""Bodies of requests: which fields there are, which values they take, and what is refused."""

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ascendspeed_data.errors import did_you_mean
from ascendspeed_infer.serve.errors import ApiError

BodyT = TypeVar("BodyT", bound="Body")

LARGEST_SEED = 2**62
"""Draws of several texts have the seeds that follow, which must fit 64 bits too."""


class Body(BaseModel):
    """What a request holds.

    Attributes:
        ignored: fields that are accepted and change nothing.
        unsupported: fields that OpenAI's API has and this server has not, with the values that mean nothing.
    """

    model_config = ConfigDict(
        extra="allow", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
    ignored: ClassVar[frozenset[str]] = frozenset({"user", "metadata", "store", "safety_identifier"})
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {}

    def check_fields(self, lenient: bool, say: Callable[[str], None]) -> None:
        """Refuse fields that are unknown or unsupported; with `lenient`, unknown ones are named in the log.

        Raises:
            ApiError: it names one of them.
        """
        for name, value in (self.model_extra or {}).items():
            if name in self.ignored or value is None:
                continue
            # In a log, a name must not look like a line of its own.
            shown = name if name.isidentifier() else repr(name[:40])
            if name in self.unsupported:
                if value not in self.unsupported[name]:
                    raise ApiError(f"{name} is not supported by this server; leave it out", param=name)
            elif lenient:
                say(f"a request has the field {shown[:80]}, which is unknown and has no effect")
            else:
                hint = did_you_mean(name, type(self).model_fields)
                raise ApiError(f"the field {shown[:80]} is unknown{hint}; leave it out", param=name)
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Body):
                value.check_fields(lenient, say)


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool = False


class TextBody(Body):
    """How texts are continued; `None` stands for a field that was not given."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    n: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-LARGEST_SEED, le=LARGEST_SEED)
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(TextBody):
    """Of `/v1/completions`."""

    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {"suffix": ()}
    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = Field(None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[one for one in self.prompt if isinstance(one, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class JsonSchemaFormat(Body):
    """A schema that an answer fits; it is always held to, whatever `strict` says."""

    ignored = Body.ignored | {"description", "strict"}
    name: str | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is for the type json_schema, and needed there")
        return self

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The schema of an answer that is JSON."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.json_schema


class FunctionName(Body):
    """Which function is meant."""

    name: str


class ToolChoice(Body):
    """The tool that is to be called."""

    type: Literal["function"]
    function: FunctionName


class ChatBody(TextBody):
    """Of `/v1/chat/completions`."""

    ignored = Body.ignored | {"service_tier", "prompt_cache_key"}
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "functions": ([],),
        "function_call": ("none",),
    }
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None


class TokenizeBody(Body):
    """Of `/tokenize`."""

    model: str | None = None
    prompt: str


class DetokenizeBody(Body):
    """Of `/detokenize`."""

    model: str | None = None
    tokens: list[int]


def read_body(kind: type[BodyT], content: bytes, lenient: bool, say: Callable[[str], None]) -> BodyT:
    """Read the JSON of a request.

    Raises:
        ApiError: it is not JSON, lacks a field, or has one that is unknown or out of range.
    """
    try:
        text = content.decode()
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError("the body holds half a surrogate pair; correct it") from None
    except (ValueError, RecursionError):
        raise ApiError("the body is not JSON") from None
    if not isinstance(value, dict):
        raise ApiError(f"the body is JSON of the type {type(value).__name__}, not an object")
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        # One field may have several problems, as where it may be of several types; the first one is shown.
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        raise ApiError(f"{name or 'the body'}: {first['msg']}", param=name) from None
    body.check_fields(lenient, say)
    return body
