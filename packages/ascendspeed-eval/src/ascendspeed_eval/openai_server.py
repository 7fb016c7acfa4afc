"""The backend for servers with the OpenAI API: completions or chat completions."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ascendspeed_eval.errors import EvaluationError, UsageError
from ascendspeed_eval.model import (
    BackendOption,
    EvaluatedModel,
    GenerateRequest,
    GenerateResult,
    LoglikelihoodRequest,
    LoglikelihoodResult,
    ModelDescription,
    Request,
    RequestFailure,
    Result,
)
from ascendspeed_eval.progress import log
from ascendspeed_eval.small_files import parse_json

if TYPE_CHECKING:
    from ascendspeed_eval.server.answers import Answer
    from ascendspeed_eval.server.client import ServerClient
    from ascendspeed_eval.server.echo import Echo
    from ascendspeed_eval.server.token_ids import TokenizedText

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_STOP_STRINGS = 4
"""Limit of the OpenAI API; this client applies further stop strings itself."""
OWN_KEYS = ("model", "prompt", "messages", "echo", "logprobs", "stream", "n", "best_of", "suffix")
"""Keys of a request that decide what is asked and how the answer is read."""


class ServerModel:
    """A model behind a server; the requests of several samples run at once.

    Args:
        client: connection.
        api: `completions` or `chat`.
        concurrency: samples at once.
        extra_body: as the user gave it, for the description.
    """

    def __init__(
        self, client: "ServerClient", api: str, concurrency: int, extra_body: Mapping[str, Any] | None = None
    ) -> None:
        self._client, self._api, self._concurrency = client, api, concurrency
        self._extra = extra_body or {}
        self._template_values: Mapping[str, Any] = {}

    def describe(self) -> ModelDescription:
        """Return the model's name; servers do not report size or weights."""
        details = {"backend": "openai", "api": self._api}
        if self._template_values:
            details["chat_template_kwargs"] = json.dumps(self._template_values, sort_keys=True)
        if self._extra:
            details["extra_body"] = json.dumps(self._extra, sort_keys=True)
        return ModelDescription(
            self._client.model, details=details, location={"server": self._client.address}
        )

    def start_chat(self, template_values: Mapping[str, Any], day: str | None) -> None:
        """Get ready to send messages.

        Raises:
            UsageError: the API takes no messages, or the server decides what an option would.
        """
        if self._api != "chat":
            raise UsageError(
                "api=completions takes texts, and --apply-chat-template sends messages; give --api chat"
            )
        if day is not None:
            raise UsageError(
                f"chat_template_date={day} cannot be sent: the server renders the chat template; leave it out"
            )
        if template_values and "chat_template_kwargs" in self._extra:
            raise UsageError("chat_template_kwargs is given by --extra-body too; keep one")
        self._template_values = template_values

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, Sequence[Mapping[str, str]]]:
        """Return the messages as JSON: the server renders them."""
        return json.dumps([dict(one) for one in messages], ensure_ascii=False, indent=1), messages

    def loglikelihood(
        self, requests: Sequence[LoglikelihoodRequest]
    ) -> list[LoglikelihoodResult | RequestFailure]:
        """Return log-likelihoods; the server must support `echo` with `logprobs`."""
        found = dict(self.answer_each([[one] for one in requests]))
        return [found[number][0] for number in range(len(requests))]  # type: ignore[misc]

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GenerateResult | RequestFailure]:
        """Continue prompts."""
        found = dict(self.answer_each([[one] for one in requests]))
        return [found[number][0] for number in range(len(requests))]  # type: ignore[misc]

    def answer_each(self, groups: Sequence[Sequence[Request]]) -> Iterator[tuple[int, list[Result]]]:
        """Answer groups of requests, `concurrency` of them at once, and yield each as soon as it is answered.

        No more are begun than the caller has taken, so what is lost if the process is killed is small.
        """
        if self._api == "chat" and any(
            isinstance(one, LoglikelihoodRequest) for own in groups for one in own
        ):
            raise UsageError(
                "api=chat returns no log-likelihoods; choose --api completions, or a protocol that generates text"
            )
        waiting = iter(range(len(groups)))
        running: dict[Future[list[Result]], int] = {}
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            while True:
                while len(running) < self._concurrency and (number := next(waiting, None)) is not None:
                    running[pool.submit(self._answer, groups[number])] = number
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        finally:
            if running:
                self._client.stop()
            pool.shutdown(wait=not running, cancel_futures=True)

    def _answer(self, requests: Sequence[Request]) -> list[Result]:
        contexts: dict[str, Echo] = {}
        tokenized: dict[str, TokenizedText] = {}
        results: list[Result] = []
        for one in requests:
            try:
                results.append(
                    self._score(one, contexts, tokenized)
                    if isinstance(one, LoglikelihoodRequest)
                    else self._continue(one)
                )
            except EvaluationError as error:
                results.append(RequestFailure(str(error)))
                break
        return results

    def _score(
        self,
        request: LoglikelihoodRequest,
        contexts: dict[str, "Echo"],
        tokenized: "dict[str, TokenizedText]",
    ) -> LoglikelihoodResult:
        from ascendspeed_eval.server.answers import AnswerError
        from ascendspeed_eval.server.echo import Echo, continuation_tokens, read_echo

        kept = len(request.context.rstrip())
        context, text = request.context[:kept], request.context + request.continuation
        whole = self._client.tokenize(text)
        if whole is not None:
            tokenized[text] = whole
            return self._score_ids(context, text, tokenized)

        def echo(prompt: str) -> Echo:
            body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
            return self._client.post("completions", body, lambda answer: read_echo(answer, prompt))

        def echo_of_context() -> Echo:
            if context not in contexts:
                contexts[context] = echo(context)
            return contexts[context]

        found = echo(text)
        try:
            own = continuation_tokens(found, text, kept, echo_of_context if context else None)
        except AnswerError as error:
            raise EvaluationError(f"{self._client.address}completions: {error.problem}") from None
        values = [found.found.token_logprobs[number] for number in own]
        if any(value is None for value in values):
            raise EvaluationError(
                f"{self._client.address}completions: it gives no log-probability of {request.continuation!r}"
            )
        tops = found.found.top_logprobs
        greedy = None
        if tops is not None:
            known = [(value, tops[number]) for value, number in zip(values, own, strict=True)]
            greedy = all(
                not top or (value is not None and value >= max(top.values())) for value, top in known
            )
        return LoglikelihoodResult(sum(value for value in values if value is not None), greedy, 0)

    def _score_ids(
        self, context: str, text: str, tokenized: "dict[str, TokenizedText]"
    ) -> LoglikelihoodResult:
        """Score ids, whose continuation is known by its number of tokens; `tokenized` keeps what was asked for."""
        from ascendspeed_eval.server.echo import read_echo
        from ascendspeed_eval.server.token_ids import ids_to_score

        address = self._client.address

        def tokenize(part: str) -> "TokenizedText":
            found = tokenized.get(part) or self._client.tokenize(part)
            if found is None:
                raise EvaluationError(f"{address}: /tokenize no longer answers")
            tokenized[part] = found
            return found

        scored = ids_to_score(context, text, tokenize, address)
        body = {"prompt": scored.ids, "max_tokens": 0, "temperature": 0, "logprobs": 1, "echo": True}
        found = self._client.post("completions", body, lambda answer: read_echo(answer, text)).found
        own = found.token_logprobs[len(scored.ids) - scored.num_continuation : len(scored.ids)]
        values = [value for value in own if value is not None]
        if len(values) != scored.num_continuation:
            raise EvaluationError(
                f"{address}completions: it gives {len(found.token_logprobs)} log-probabilities of {len(scored.ids)} ids"
            )
        greedy = None
        if found.top_logprobs is not None:
            tops = found.top_logprobs[len(scored.ids) - scored.num_continuation : len(scored.ids)]
            greedy = all(
                not top or value >= max(top.values()) for value, top in zip(values, tops, strict=True)
            )
        return LoglikelihoodResult(sum(values), greedy, scored.truncated_tokens)

    def _continue(self, request: GenerateRequest) -> GenerateResult:
        from ascendspeed_eval.server.answers import Continuation, continuation_of

        body: dict[str, Any] = {"max_tokens": request.max_new_tokens, "temperature": request.temperature}
        if request.temperature:
            body["seed"] = request.seed
        if request.stop:
            body["stop"] = list(request.stop[:MAX_STOP_STRINGS])
        is_chat = self._api == "chat"

        def read(answer: "Answer") -> Continuation:
            return continuation_of(answer, is_chat)

        if is_chat:
            sent = request.messages or ({"role": "user", "content": request.prompt},)
            body["messages"] = [dict(one) for one in sent]
            if self._template_values:
                body["chat_template_kwargs"] = dict(self._template_values)
            found = self._client.post("chat/completions", body, read)
        else:
            found = self._client.post("completions", {**body, "prompt": request.prompt}, read)
        text, reason = found.text, found.finish_reason
        for stop in request.stop:
            if stop in text:
                # The server's own limit came after the text that ends the answer here.
                text, reason = text.partition(stop)[0], "stop"
        return GenerateResult(text, reason, 0, found.reasoning)


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
        BackendOption("concurrency", int, "Number of samples asked at once. [default: 8]"),
        BackendOption("retries", int, "Retries of a failed request. [default: 5]"),
        BackendOption("timeout_seconds", float, "Timeout of a request, in seconds. [default: 600]"),
        BackendOption(
            "extra_body",
            str,
            "JSON object with further keys of each request, such as '{\"top_k\": 20}'; a value null leaves a key out, "
            "and max_completion_tokens takes the place of max_tokens.",
        ),
        BackendOption(
            "header", list[str], "Further header of each request, as 'Name: value'; recorded nowhere."
        ),
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
            if not 0 < options.get(name, 1) < float("inf"):
                raise UsageError(f"{name}={options[name]} is not above 0; give a larger value")
        if options.get("retries", 0) < 0:
            raise UsageError(f"retries={options['retries']} is below 0; give 0 for none")
        check_address(options["base_url"])
        read_headers(options.get("header", ()))
        for line in replaced_settings(read_extra_body(options.get("extra_body"))):
            log(line)
        return False

    @contextmanager
    def open(self, options: Mapping[str, Any]) -> Iterator[EvaluatedModel | None]:
        """Connect."""
        import httpx

        from ascendspeed_eval.server.client import ServerClient

        key = os.environ.get(KEY_VARIABLE)
        headers = read_headers([f"Authorization: Bearer {key}"] if key else [], KEY_VARIABLE)
        headers |= read_headers(options.get("header", ()))
        timeout, extra = options.get("timeout_seconds", 600.0), read_extra_body(options.get("extra_body"))
        url = httpx.URL(options["base_url"].rstrip("/") + "/")
        secrets = [key or "", url.password, *headers.values()]
        concurrency = options.get("concurrency", 8)
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        with httpx.Client(base_url=url, headers=headers, timeout=timeout, limits=limits) as http:
            client = ServerClient(
                http, check_address(options["base_url"]), options["served_model"], extra,
                options.get("retries", 5), timeout, secrets,
            )  # fmt: skip
            try:
                yield ServerModel(client, options.get("api", "completions"), concurrency, extra)
            finally:
                client.stop()
                for reason, count in sorted(client.repeated().items()):
                    log(f"{client.address}: {count} requests were sent again after {reason}")


def check_address(text: str) -> str:
    """Return the address of a server as messages show it: without user, password and query.

    Raises:
        UsageError: it is no address of HTTP.
    """
    import httpx

    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError, ValueError) as error:
        raise UsageError(
            f"base_url is no address: {error}; give one such as http://localhost:8000/v1"
        ) from None
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(f"base_url={text} is no address of HTTP; give one such as http://localhost:8000/v1")
    if url.query or url.fragment:
        raise UsageError("base_url has a query or a fragment; give keys by --header")
    return str(url.copy_with(username=None, password=None)).rstrip("/") + "/"


def read_headers(lines: Sequence[str], source: str = "header") -> dict[str, str]:
    """Return headers by name.

    Raises:
        UsageError: one is not `Name: value`, or holds what a header cannot; values are not shown.
    """
    found = {}
    for number, line in enumerate(lines, 1):
        name, colon, value = (part.strip() for part in line.partition(":"))
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
            raise UsageError(
                f"{source}, number {number}, is not 'Name: value'; correct it (values are not shown)"
            )
        if not value.isascii() or not value.isprintable():
            raise UsageError(f"{source}: the value of {name} holds more than printable ASCII; correct it")
        found[name] = value
    return found


def read_extra_body(text: str | None) -> dict[str, Any]:
    """Return the keys that a user adds to each request.

    Raises:
        UsageError: it is no JSON object, or sets what this program sets itself.
    """
    try:
        found = parse_json(text or "{}", "extra_body")
    except EvaluationError as error:
        raise UsageError(str(error).replace("correct the file", "correct it")) from None
    if not isinstance(found, dict):
        raise UsageError(f'extra_body={text} is no JSON object; give one such as {{"top_k": 20}}')
    for key in found:
        if key in OWN_KEYS:
            raise UsageError(f"extra_body has {key}, which this program sets itself; leave it out")
    return found


def replaced_settings(extra: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each key that takes the place of one of the run's own settings."""
    for key in ("temperature", "max_tokens", "max_completion_tokens", "seed", "stop"):
        if key in extra:
            shown = "is left out" if extra[key] is None else f"is {json.dumps(extra[key])}"
            yield f"extra_body: {key} {shown}, whatever the protocol says"


backend = ServerBackend()
