"""The routes of the server."""

import asyncio
import hashlib
import hmac
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from ascendspeed_data.errors import AscendSpeedError
from ascendspeed_infer import __version__
from ascendspeed_infer.serve.bodies import (
    BodyT,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read_body,
)
from ascendspeed_infer.serve.chat_completions import ChatCall
from ascendspeed_infer.serve.chat_page import add_chat_page
from ascendspeed_infer.serve.completions import CompletionCall, Json
from ascendspeed_infer.serve.errors import ApiError, failed, internal_error
from ascendspeed_infer.serve.metrics import Metrics
from ascendspeed_infer.serve.responses import ResponsesBody, ResponsesCall
from ascendspeed_infer.serve.served_model import CACHE_SALT, ServedModel

OPEN_PATHS = ("/", "/health", "/ready")
"""Asked by what watches the server, which has no key, and the chat page, which sends one with what it asks."""
CLIENT_LEFT = 499
"""Status that is counted for a client that left; nobody gets it."""

REFERENCE = "#/components/schemas/{model}"

ResultT = TypeVar("ResultT")


def build_app(served: ServedModel, api_keys: Sequence[str] = ()) -> FastAPI:
    """Return the application.

    Args:
        served: answers.
        api_keys: of which a request must give one; none lets everybody in.
    """
    digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def check_key(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        own = hashlib.sha256(given.strip().encode()).digest()
        # All are compared, so that the time says nothing of which one is near.
        found = [hmac.compare_digest(own, digest) for digest in digests]
        if digests and request.url.path not in OPEN_PATHS and not (any(found) and scheme.lower() == "bearer"):
            raise ApiError("the request has no valid API key", 401, kind="authentication_error")
        if len(digests) > 1:
            # Whose prompt was asked before would show in how many of its tokens are cached.
            CACHE_SALT.set(own.hex())
        # A browser sends a page's request to another site without asking, as long as it needs no key.
        origin = request.headers.get("origin")
        if not digests and origin is not None and origin.partition("://")[2] != request.headers.get("host"):
            raise ApiError("pages of other sites may not ask this server", 403, kind="permission_error")

    app = FastAPI(
        title="asd-infer serve",
        version=__version__,
        dependencies=[Depends(check_key)],
        docs_url=None,
        redoc_url=None,
    )
    _add_errors(app, served)
    _add_state_routes(app, served)
    _add_model_routes(app, served)
    add_chat_page(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


class RequestCounter:
    """Counts answers by path and status.

    Args:
        app: the application.
        metrics: has the count.
    """

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request (ASGI)."""

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting)


def _add_errors(app: FastAPI, served: ServedModel) -> None:
    app.add_middleware(RequestCounter, metrics=served.metrics)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.content(), error.status, error.headers())

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        made = ApiError(f"{request.method} {request.url.path}: {error.detail}", error.status_code)
        return JSONResponse(made.content(), made.status, error.headers)

    app.add_exception_handler(404, http_error)  # type: ignore[arg-type]
    app.add_exception_handler(405, http_error)  # type: ignore[arg-type]

    @app.exception_handler(Exception)
    async def other_error(request: Request, error: Exception) -> Response:
        made = internal_error()
        return JSONResponse(made.content(), made.status)


def _add_state_routes(app: FastAPI, served: ServedModel) -> None:
    @app.get("/health")
    async def health() -> Response:
        """Whether the engine works."""
        return JSONResponse({"status": "ok"} if served.driver.failure is None else {"status": "failed"},
                            200 if served.driver.failure is None else 503)  # fmt: skip

    @app.get("/ready")
    async def ready() -> Response:
        """Whether requests are taken."""
        is_ready = served.driver.is_accepting
        return JSONResponse({"status": "ready" if is_ready else "closing"}, 200 if is_ready else 503)

    @app.get("/version")
    async def version() -> Response:
        """The version of the server."""
        return JSONResponse({"version": __version__})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts in Prometheus' form."""
        return Response(served.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> Response:
        """The models."""
        return JSONResponse({"object": "list", "data": [_model_card(served, name) for name in served.names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        """One model."""
        served.adapter_named(name)
        return JSONResponse(_model_card(served, name))


def _add_model_routes(app: FastAPI, served: ServedModel) -> None:
    @app.post("/v1/responses", openapi_extra=_takes(ResponsesBody))
    async def responses(request: Request) -> Response:
        """Answer a conversation, in the form of the Responses API."""
        body = await _body(request, served, ResponsesBody)
        call = await _planned(served, ResponsesCall, body)
        return await _answered(request, served, call.events(), call.answer, bool(body.stream))

    @app.post("/v1/completions", openapi_extra=_takes(CompletionBody))
    async def completions(request: Request) -> Response:
        """Continue texts."""
        body = await _body(request, served, CompletionBody)
        call = await _planned(served, CompletionCall, body)
        return await _answered(request, served, call.events(), call.answer, bool(body.stream))

    @app.post("/v1/chat/completions", openapi_extra=_takes(ChatBody))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        body = await _body(request, served, ChatBody)
        call = await _planned(served, ChatCall, body)
        return await _answered(request, served, call.events(), call.answer, bool(body.stream))

    @app.post("/tokenize", openapi_extra=_takes(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        """Return the ids of a text."""
        body = await _body(request, served, TokenizeBody)
        served.adapter_named(body.model)
        ids = served.encode(body.prompt)
        longest, tokenizer = served.driver.engine.max_model_len, served.model.tokenizer
        start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
        found = {"tokens": ids, "count": len(ids), "max_model_len": longest}
        return JSONResponse(found | {"max_scored_tokens": longest + 1, "start_token_id": start})

    @app.post("/detokenize", openapi_extra=_takes(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        """Return the text of ids."""
        body = await _body(request, served, DetokenizeBody)
        served.adapter_named(body.model)
        ids = served.encode(body.tokens, "tokens")
        return JSONResponse({"prompt": served.model.tokenizer.decode(ids)})


async def _planned(served: ServedModel, call: Callable[..., ResultT], *arguments: Any) -> ResultT:
    """Make a call on the thread that reads requests, so that long prompts and schemas hold nobody up."""
    try:
        return await asyncio.get_running_loop().run_in_executor(served.planner, call, served, *arguments)
    except RecursionError:
        raise ApiError("the request is nested too deeply; make it flatter") from None
    except Exception as error:  # noqa: BLE001 - told to the client
        raise _told(served, error) from None


async def _answered(
    request: Request,
    served: ServedModel,
    events: AsyncIterator[Json],
    answer: Callable[[], Awaitable[Json]],
    streams: bool,
) -> Response:
    """Answer whole or as a stream; a client that leaves ends what is computed for it."""
    try:
        if not streams:
            found = await _unless_gone(request, answer())
            return Response(status_code=CLIENT_LEFT) if found is None else JSONResponse(found)
        # The status is known once there is a first piece.
        first = await _unless_gone(request, anext(events))
    except Exception as error:  # noqa: BLE001 - told to the client
        raise _told(served, error) from None
    if first is None:
        return Response(status_code=CLIENT_LEFT)
    return StreamingResponse(_server_sent(served, first, events), media_type="text/event-stream")


async def _server_sent(served: ServedModel, first: Json, events: Any) -> AsyncIterator[bytes]:
    """Yield server-sent events."""
    async with aclosing(events):
        try:
            yield _event(first)
            async for one in events:
                yield _event(one)
        except Exception as error:  # noqa: BLE001 - the status is sent already, so the error is an event
            yield _event(_told(served, error).content())
        if "type" not in first:
            yield b"data: [DONE]\n\n"


def _told(served: ServedModel, error: Exception) -> ApiError:
    """Return the error that the client gets; the log has those that no request explains."""
    if not isinstance(error, AscendSpeedError | ApiError):
        served.say("".join(traceback.format_exception(error)))
    return failed(error)


def _event(content: Json) -> bytes:
    # The events of the Responses API have a name.
    name = f"event: {content['type']}\n".encode() if "type" in content else b""
    return name + b"data: " + json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


async def _unless_gone(request: Request, work: Awaitable[ResultT]) -> ResultT | None:
    """Wait for something, and cancel it if the client leaves; `None` then."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _body(request: Request, served: ServedModel, kind: type[BodyT]) -> BodyT:
    limit, content = served.limits.max_body_bytes, bytearray()
    try:
        async with asyncio.timeout(served.limits.request_seconds):
            async for piece in request.stream():
                content += piece
                if len(content) > limit:
                    raise ApiError(f"the body is larger than the {limit} bytes allowed", 413)
    except TimeoutError:
        raise ApiError("the body did not arrive in time", 408) from None
    except ClientDisconnect:
        raise ApiError("the client left before its body arrived") from None
    return read_body(kind, bytes(content), served.limits.lenient, served.say)


def _model_card(served: ServedModel, name: str) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "ascendspeed",
        "parent": served.name if name != served.name else None,
        "max_model_len": served.driver.engine.max_model_len,
    }


def _takes(kind: type[BodyT]) -> Json:
    """Describe the body of a route in the OpenAPI document; what it refers to is added by `_document`."""
    schema = kind.model_json_schema(ref_template=REFERENCE)
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _document(app: FastAPI) -> Json:
    """Return the OpenAPI document: of bodies with all their parts, and of answers the form of errors."""
    made: Json = get_openapi(title=app.title, version=app.version, routes=app.routes)
    parts = made.setdefault("components", {}).setdefault("schemas", {})
    for kind in (CompletionBody, ChatBody, ResponsesBody, TokenizeBody, DetokenizeBody):
        parts |= kind.model_json_schema(ref_template=REFERENCE).get("$defs", {})
    for path in made["paths"].values():
        for one in path.values():
            one["responses"] |= {"4XX": {"description": "what is wrong"}, "5XX": {"description": "failed"}}
            one["responses"].pop("422", None)
    return made
