"""The backend for any server that speaks OpenAI's completions or chat completions."""

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
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
TRY_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
MOST_STOPS = 4
"""OpenAI's own limit; further stops are applied here."""

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class ServerModel:
    """Ask a server, several requests at once.

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
        """Name the model; a server says nothing of its weights."""
        return ModelDescription(
            self._name, details={"backend": "openai", "server": str(self._client.base_url), "api": self._api}
        )

    def loglikelihood(self, requests: Sequence[LoglikelihoodRequest]) -> list[LoglikelihoodResult]:
        """Score continuations with `echo` and `logprobs`, which not every server offers."""
        if self._api == "chat":
            raise UsageError(
                "api=chat gives no log-likelihoods; choose --api completions, or a protocol that generates text"
            )
        return self._each(requests, self._score)

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult]:
        """Continue prompts."""
        return self._each(requests, self._continue)

    def _each(self, requests: Sequence[Request], ask: Callable[[Request], Answer]) -> list[Answer]:
        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(ask, requests))

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
                f"{self._client.base_url} gives no log-probabilities of the prompt (echo with logprobs); choose a "
                "protocol that generates text"
            ) from None
        # A token that crosses the border counts to the continuation, as spaces at the end of the context do.
        own = [one for one in tokens if one[0] + len(one[1]) > kept and one[0] < len(text)]
        if not own or any(value is None for _, _, value, _ in own):
            raise EvaluationError(
                f"{self._client.base_url} gives no log-probability of {request.continuation!r}"
            )
        greedy = all(not top or value >= max(top.values()) for _, _, value, top in own)
        return LoglikelihoodResult(sum(value for _, _, value, _ in own), greedy, 0)

    def _continue(self, request: GenerateRequest) -> GenerateResult:
        body: dict[str, Any] = {"max_tokens": request.max_new_tokens, "temperature": request.temperature}
        if request.temperature:
            body["seed"] = request.seed
        if request.stop:
            body["stop"] = list(request.stop[:MOST_STOPS])
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
        """Ask, and ask again after a pause where that may help.

        Raises:
            EvaluationError: no answer, or one that says what is wrong.
        """
        import httpx

        pause, problem = FIRST_PAUSE_SECONDS, ""
        for tries in range(self._retries + 1):
            if tries:
                time.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
            try:
                answer = self._client.post(path, json={"model": self._name, **body})
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if answer.status_code == httpx.codes.OK:
                return answer.json()
            problem = f"status {answer.status_code}: {answer.text[:200]}"
            if answer.status_code not in TRY_AGAIN:
                break
            pause = max(pause, _asked_pause(answer.headers.get("retry-after")))
        raise EvaluationError(f"{self._client.base_url}{path}: {problem}")


def _asked_pause(header: str | None) -> float:
    """Return the seconds that a server asks to wait."""
    try:
        return min(float(header or 0), LONGEST_PAUSE_SECONDS)
    except ValueError:
        return 0.0


class ServerBackend:
    """The entry point `openai`."""

    name = "openai"
    summary = "any OpenAI-compatible server"
    options: Sequence[BackendOption] = (
        BackendOption(
            "base_url", str, f"Server, such as http://localhost:8000/v1; the key is read from {KEY_VARIABLE}."
        ),
        BackendOption("served_model", str, "Model, as the server knows it."),
        BackendOption("api", str, "completions or chat. [default: completions]"),
        BackendOption("concurrency", int, "Requests at once. [default: 8]"),
        BackendOption("retries", int, "Further tries of a request. [default: 5]"),
        BackendOption("timeout_seconds", float, "Longest wait for an answer. [default: 600]"),
    )

    def claims(self, options: Mapping[str, Any]) -> bool:
        """Wanted when a server is named."""
        return "base_url" in options

    def launch(self, options: Mapping[str, Any], arguments: Sequence[str]) -> bool:
        """Check the options; one process is enough."""
        if "served_model" not in options:
            raise UsageError("served_model is missing; give --served-model NAME, as the server knows it")
        if options.get("api", "completions") not in ("completions", "chat"):
            raise UsageError(f"api={options['api']} is unknown; choose completions or chat")
        for name in ("concurrency", "timeout_seconds"):
            if options.get(name, 1) <= 0:
                raise UsageError(f"{name}={options[name]} is not above 0; give a larger one")
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
