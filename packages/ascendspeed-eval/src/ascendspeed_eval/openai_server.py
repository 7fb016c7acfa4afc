"""The backend for servers with the OpenAI API: completions or chat completions."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ascendspeed_eval.errors import EvaluationError, UsageError
from ascendspeed_eval.model import (
    BackendOption,
    EvaluatedModel,
    GenerateRequest,
    GenerateResult,
    LoglikelihoodRequest,
    LoglikelihoodResult,
    ModelDescription,
)

if TYPE_CHECKING:
    import httpx

KEY_VARIABLE = "OPENAI_API_KEY"
MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0
RETRIED_STATUS_CODES = (408, 409, 425, 429, 500, 502, 503, 504)
MAX_STOP_STRINGS = 4
"""Limit of the OpenAI API; this client applies further stop strings itself."""

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class ServerModel:
    """A model behind a server; several requests run at once.

    Args:
        client: connection; its base address ends in `/v1`.
        name: model, as the server knows it.
        api: `completions` or `chat`.
        concurrency: requests at once.
        retries: further tries after an answer that may pass, such as 429 or 503.
    """

    def __init__(self, client: "httpx.Client", name: str, api: str, concurrency: int, retries: int) -> None:
        self._client, self._name, self._api = client, name, api
        self._concurrency, self._retries = concurrency, retries

    def describe(self) -> ModelDescription:
        """Return the model's name; servers do not report size or weights."""
        return ModelDescription(
            self._name, details={"backend": "openai", "server": str(self._client.base_url), "api": self._api}
        )

    def loglikelihood(self, requests: Sequence[LoglikelihoodRequest]) -> list[LoglikelihoodResult]:
        """Return log-likelihoods; the server must support `echo` with `logprobs`."""
        if self._api == "chat":
            raise UsageError(
                "api=chat returns no log-likelihoods; choose --api completions, or a protocol that generates text"
            )
        return self._each(requests, self._score)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        """Continue prompts."""
        return self._each(requests, self._continue)

    def _each(self, requests: Sequence[Request], send: Callable[[Request], Answer]) -> list[Answer]:
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(send, requests))

    def _score(self, request: LoglikelihoodRequest) -> LoglikelihoodResult:
        kept = len(request.context.rstrip())
        text = request.context + request.continuation
        body = {"prompt": text, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        choice = self._post("completions", body)["choices"][0]
        try:
            found = choice["logprobs"]
            tokens = list(
                zip(
                    found["text_offset"],
                    found["tokens"],
                    found["token_logprobs"],
                    found["top_logprobs"],
                    strict=True,
                )
            )
        except (KeyError, TypeError, ValueError):
            raise EvaluationError(
                f"{self._client.base_url} returns no log-probabilities of the prompt (echo with logprobs); choose a "
                "protocol that generates text"
            ) from None
        # A token that crosses the boundary belongs to the continuation; so do spaces at the end of the context.
        own = [one for one in tokens if one[0] + len(one[1]) > kept and one[0] < len(text)]
        if not own or any(value is None for _, _, value, _ in own):
            raise EvaluationError(
                f"{self._client.base_url} returns no log-probability of {request.continuation!r}"
            )
        greedy = all(not top or value >= max(top.values()) for _, _, value, top in own)
        return LoglikelihoodResult(sum(value for _, _, value, _ in own), greedy, 0)

    def _continue(self, request: GenerateRequest) -> GenerateResult:
        body: dict[str, Any] = {"max_tokens": request.max_new_tokens, "temperature": request.temperature}
        if request.temperature:
            body["seed"] = request.seed
        if request.stop:
            body["stop"] = list(request.stop[:MAX_STOP_STRINGS])
        if self._api == "chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
            choice = self._post("chat/completions", body)["choices"][0]
            text = choice["message"]["content"] or ""
        else:
            choice = self._post("completions", {**body, "prompt": request.prompt})["choices"][0]
            text = choice["text"]
        for stop in request.stop:
            text = text.partition(stop)[0]
        return GenerateResult(text, "length" if choice.get("finish_reason") == "length" else "stop")

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a request; retry after a pause if the error may be temporary.

        Raises:
            EvaluationError: the server does not answer, or answers with an error.
        """
        import httpx

        pause, problem = MIN_PAUSE_SECONDS, ""
        for tries in range(self._retries + 1):
            if tries:
                time.sleep(pause)
                pause = min(pause * 2, MAX_PAUSE_SECONDS)
            try:
                answer = self._client.post(path, json={"model": self._name, **body})
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == httpx.codes.OK:
                return answer.json()
            problem = f"status {answer.status_code}: {answer.text[:200]}"
            if answer.status_code not in RETRIED_STATUS_CODES:
                break
            pause = max(pause, _retry_after_seconds(answer.headers.get("retry-after")))
        raise EvaluationError(f"{self._client.base_url}{path}: {problem}")


def _retry_after_seconds(header: str | None) -> float:
    """Return the pause that a `Retry-After` header asks for, in seconds."""
    try:
        return min(float(header or 0), MAX_PAUSE_SECONDS)
    except ValueError:
        return 0.0


class ServerBackend:
    """The entry point `openai`."""

    name = "openai"
    summary = "any OpenAI-compatible server"
    options: Sequence[BackendOption] = (
        BackendOption(
            "base_url",
            str,
            f"Address of the server, such as http://localhost:8000/v1; {KEY_VARIABLE} holds the API key.",
        ),
        BackendOption("served_model", str, "Name of the model on the server."),
        BackendOption("api", str, "API to use: completions or chat. [default: completions]"),
        BackendOption("concurrency", int, "Number of requests at once. [default: 8]"),
        BackendOption("retries", int, "Retries of a failed request. [default: 5]"),
        BackendOption("timeout_seconds", float, "Timeout of a request, in seconds. [default: 600]"),
    )

    def claims(self, options: Mapping[str, Any]) -> bool:
        """Return whether a server is given."""
        return "base_url" in options

    def launch(self, options: Mapping[str, Any], arguments: Sequence[str]) -> bool:
        """Check the options; one process is enough."""
        if "served_model" not in options:
            raise UsageError(
                "served_model is missing; give --served-model NAME, the name of the model on the server"
            )
        if options.get("api", "completions") not in ("completions", "chat"):
            raise UsageError(f"api={options['api']} is unknown; choose completions or chat")
        for name in ("concurrency", "timeout_seconds"):
            if options.get(name, 1) <= 0:
                raise UsageError(f"{name}={options[name]} is not above 0; give a larger value")
        return False

    @contextmanager
    def open(self, options: Mapping[str, Any]) -> Iterator[EvaluatedModel | None]:
        """Connect."""
        import httpx

        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(
            base_url=options["base_url"].rstrip("/") + "/",
            headers=headers,
            timeout=options.get("timeout_seconds", 600.0),
        ) as client:
            yield ServerModel(
                client,
                options["served_model"],
                options.get("api", "completions"),
                options.get("concurrency", 8),
                options.get("retries", 5),
            )


backend = ServerBackend()
