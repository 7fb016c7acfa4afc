"""Send requests to a server: again after a pause where that may help, never without an end."""

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from ascendspeed_eval.errors import EvaluationError
from ascendspeed_eval.server.answers import TEMPORARY_CODES, Answer, AnswerError, parse_answer, shorten
from ascendspeed_eval.server.token_ids import TokenizedText, read_tokenized

if TYPE_CHECKING:
    import httpx

MIN_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.5, 30.0
MAX_RETRY_AFTER_SECONDS = 600.0
"""A server that asks for a longer pause has refused the request."""
MAX_ANSWER_BYTES = 64 * 1024**2
MIN_SECRET_CHARACTERS = 6

Read = TypeVar("Read")


class ServerClient:
    """A connection that many threads use at once.

    Args:
        client: connection; its base address ends in `/v1/`.
        address: the base address for messages, without passwords.
        model: as the server knows it.
        extra_body: keys added to every request; `null` takes a key away.
        retries: further tries after an answer that may pass, such as 429 or 503.
        timeout_seconds: most time for one answer, from its first to its last byte.
        secrets: texts that no message may show.
    """

    def __init__(
        self,
        client: "httpx.Client",
        address: str,
        model: str,
        extra_body: Mapping[str, Any],
        retries: int,
        timeout_seconds: float,
        secrets: Sequence[str] = (),
    ) -> None:
        self._client, self.address, self.model = client, address, model
        self._extra, self._retries, self._timeout = extra_body, retries, timeout_seconds
        self._secrets = [one for one in secrets if len(one) >= MIN_SECRET_CHARACTERS]
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._repeated: Counter[str] = Counter()
        self._tells_ids: bool | None = None
        """Whether the server has `/tokenize`; `None` before it was asked."""

    def stop(self) -> None:
        """Begin no further try; threads that wait for one give up."""
        self._stopped.set()

    def repeated(self) -> dict[str, int]:
        """Return how many requests were sent again, by the reason."""
        with self._lock:
            return dict(self._repeated)

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Answer], Read]) -> Read:
        """Send a request until its answer can be read.

        Args:
            path: below the base address.
            body: of the request, without the model.
            read: takes what is wanted from an answer, or raises `AnswerError`.

        Raises:
            EvaluationError: the server does not answer, or answers with something else.
        """
        content = self._content(body)
        pause, tries = MIN_PAUSE_SECONDS, 0
        while True:
            tries += 1
            try:
                return read(self._send(path, content))
            except AnswerError as error:
                problem, wait = error, error.retry_after_seconds
            if not problem.is_temporary or tries > self._retries or self._stopped.is_set():
                raise EvaluationError(self._message(path, problem.problem, tries))
            if wait > MAX_RETRY_AFTER_SECONDS:
                asked = f"{problem.problem}; it asks for a pause of {wait:.0f} s (most: {MAX_RETRY_AFTER_SECONDS:.0f})"
                raise EvaluationError(self._message(path, asked, tries))
            with self._lock:
                self._repeated[problem.problem.partition(":")[0]] += 1
            # Requests that failed together are not sent together again.
            self._stopped.wait(max(pause * random.uniform(0.5, 1), wait))
            pause = min(pause * 2, MAX_PAUSE_SECONDS)

    def tokenize(self, text: str) -> TokenizedText | None:
        """Return the ids of a text; `None` if the server does not tell them.

        Raises:
            EvaluationError: it did before.
        """
        import httpx

        if self._tells_ids is False:
            return None
        # The path lies beside that of the API.
        base = self._client.base_url
        url = base.copy_with(path=base.path.rstrip("/").removesuffix("/v1") + "/tokenize")
        found = None
        for _ in range(self._retries + 1):
            try:
                answer = self._client.post(url, json={"model": self.model, "prompt": text})
            except httpx.HTTPError:
                self._stopped.wait(MIN_PAUSE_SECONDS)
                continue
            if answer.status_code == httpx.codes.OK:
                found = read_tokenized(answer.content)
            if answer.status_code < 500 and answer.status_code not in TEMPORARY_CODES:
                break
            self._stopped.wait(MIN_PAUSE_SECONDS)
        if found is None and self._tells_ids:
            raise EvaluationError(f"{self.address}: /tokenize no longer answers")
        if found is not None or self._tells_ids is None:
            self._tells_ids = found is not None
        return found

    def _content(self, body: Mapping[str, Any]) -> bytes:
        whole = {"model": self.model, **body, **self._extra}
        if body.get("echo"):
            # A prompt is only scored when one token is asked for after it, whatever texts get.
            whole |= body
            whole.pop("max_completion_tokens", None)
        elif self._extra.get("max_completion_tokens") is not None:
            # The newer name of max_tokens; servers refuse both together.
            whole.pop("max_tokens", None)
        return json.dumps({key: value for key, value in whole.items() if value is not None}).encode()

    def _send(self, path: str, content: bytes) -> Answer:
        import httpx

        deadline, data = time.monotonic() + self._timeout, bytearray()
        headers = {"Content-Type": "application/json"}
        try:
            with self._client.stream("POST", path, content=content, headers=headers) as answer:
                for part in answer.iter_bytes():
                    data += part
                    if len(data) > MAX_ANSWER_BYTES:
                        raise AnswerError(f"its answer is longer than {MAX_ANSWER_BYTES:,} bytes")
                    if time.monotonic() > deadline:
                        raise AnswerError(f"its answer took more than {self._timeout:g} s")
        except httpx.HTTPError as error:
            raise AnswerError(f"{type(error).__name__}: {error}".removesuffix(": ")) from None
        if answer.status_code == httpx.codes.OK:
            return parse_answer(bytes(data))
        status = answer.status_code
        where = answer.headers.get("location") if answer.is_redirect else None
        told = f"it points to {where}; give that address" if where else data.decode("utf-8", "replace")
        raise AnswerError(
            f"status {status}: {shorten(told)}",
            status >= 500 or status in TEMPORARY_CODES,
            retry_after_seconds(answer.headers.get("retry-after"), answer.headers.get("date")),
        )

    def _message(self, path: str, problem: str, tries: int) -> str:
        for secret in self._secrets:
            problem = problem.replace(secret, "***")
        return f"{self.address}{path}: {shorten(problem, 400)}" + (f" ({tries} tries)" if tries > 1 else "")


def retry_after_seconds(header: str | None, date: str | None = None) -> float:
    """Return the pause that a `Retry-After` header asks for: seconds, or a date (RFC 9110, section 10.2.3).

    Args:
        header: its value; one that is neither counts as no wish.
        date: the header `Date` of the same answer, the server's own clock.
    """
    if not header:
        return 0.0
    try:
        seconds = float(header)
    except ValueError:
        until = _date(header)
        seconds = 0.0 if until is None else (until - (_date(date) or datetime.now(UTC))).total_seconds()
    return seconds if 0 < seconds < float("inf") else 0.0


def _date(header: str | None) -> datetime | None:
    try:
        found = parsedate_to_datetime(header or "")
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
