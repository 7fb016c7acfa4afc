"""A server with the OpenAI API whose answers are bad at random, from a seed: a share of them, in many ways.

Whether an answer is bad depends on the seed, the prompt and the number of the try, so a run can be repeated.
"""

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = re.compile(r" ?\w+| ?[^\w\s]|\s", re.S)
Body = dict[str, Any]
Answer = tuple[int, dict[str, str], bytes]


def status(code: int, body: object = "busy", **headers: str) -> Callable[[Body], Answer]:
    text = body if isinstance(body, str) else json.dumps(body)
    return lambda good: (
        code,
        {name.replace("_", "-"): value for name, value in headers.items()},
        text.encode(),
    )


def changed(change: Callable[[Body], object]) -> Callable[[Body], Answer]:
    """A good answer with a change."""

    def answer(good: Body) -> Answer:
        whole = json.loads(json.dumps(good))
        change(whole)
        return 200, {}, json.dumps(whole).encode()

    return answer


def first(body: Body) -> Body:
    found: Body = body["choices"][0]
    return found


def retry_date(good: Body) -> Answer:
    return 429, {"Retry-After": formatdate(time.time() + 1, usegmt=True)}, b"{}"


ANY_REQUEST: dict[str, Callable[[Body], Answer]] = {
    "status 500": status(500, {"error": "boom"}),
    "status 503, Retry-After in seconds": status(503, "busy", Retry_After="0.2"),
    "status 429, Retry-After as a date": retry_date,
    "status 524 of a proxy, in HTML": status(524, "<html>A timeout occurred</html>"),
    "an error under status 200": status(
        200, {"error": {"code": 502, "message": "upstream"}, "choices": None}
    ),
    "HTML under status 200": status(200, "<html><body>Please log in</body></html>"),
    "nothing": status(200, ""),
    "half a body": lambda good: (200, {}, json.dumps(good).encode()[:40]),
    "a body shorter than its length": lambda good: (200, {"Content-Length": "9999"}, b'{"choices"'),
    "a closed connection": lambda good: (0, {}, b""),
    "no choices": changed(lambda body: body.update(choices=[])),
    "two choices": changed(lambda body: body["choices"].append(first(body))),
    "choices as an object": changed(lambda body: body.update(choices={"0": first(body)})),
    "brackets without an end": status(200, "[" * 100_000),
    "bytes that are not UTF-8": lambda good: (200, {}, b'{"choices": "\xff\xfe"}'),
    "finish_reason error": changed(lambda body: first(body).update(finish_reason="error")),
}
TEXT_REQUEST: dict[str, Callable[[Body], Answer]] = {
    "null for the text": changed(lambda body: first(body).update(text=None, finish_reason="stop")),
    "a number for the text": changed(lambda body: first(body).update(text=7)),
}


def without_last(name: str) -> Callable[[Body], Answer]:
    return changed(lambda body: first(body)["logprobs"][name].pop())


def shift(body: Body) -> None:
    found = first(body)["logprobs"]
    for name in ("token_logprobs", "top_logprobs"):
        found[name] = [*found[name][1:], None]


SCORE_REQUEST: dict[str, Callable[[Body], Answer]] = {
    "no log-probabilities for some tokens": without_last("token_logprobs"),
    "NaN for a log-probability": changed(
        lambda body: first(body)["logprobs"]["token_logprobs"].__setitem__(-2, float("nan"))
    ),
    "a positive log-probability": changed(
        lambda body: first(body)["logprobs"]["token_logprobs"].__setitem__(-2, 3.5)
    ),
    "log-probabilities of the next tokens": changed(shift),
}


def echoed(prompt: str, value: float, kind: str) -> Body:
    """Log-probabilities of a prompt; the last token has `value`. Servers count text_offset in several ways."""
    names = ([kind] if kind.startswith("<") else []) + [m[0] for m in TOKEN.finditer(prompt)] + [" the"]
    values = [None, *(-1.0 - 0.01 * (n % 7) for n in range(1, len(names)))]
    values[-2] = value
    shown = [f"token_id:{n}" for n in range(len(names))] if kind == "ids" else names
    starts = [sum(map(len, shown[:n])) for n in range(len(shown))]
    tops = [
        None if one is None else {name: one, " zz": -9.0} for name, one in zip(shown, values, strict=True)
    ]
    return {"tokens": shown, "text_offset": starts, "token_logprobs": values, "top_logprobs": tops}


class MisbehavingServer:
    """The server's knowledge, its mood and its books.

    Args:
        texts: what a good server answers, by a part of the prompt.
        seed: of the bad answers.
        share: of answers that are bad.
        offsets: kinds of `text_offset` that questions are echoed with.
    """

    def __init__(
        self, texts: Mapping[str, str], seed: int, share: float, offsets: tuple[str, ...] = ("",)
    ) -> None:
        self.texts, self.seed, self.share, self.offsets = texts, seed, share, offsets
        self.refused: set[str] = set()
        """Prompts that get status 400, whatever the try."""
        self.lock = threading.Lock()
        self.tries: Counter[str] = Counter()
        self.good: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.address = ""

    def answer(self, body: Body) -> Answer:
        """Return status, headers and body of an answer."""
        prompt, is_score = body["prompt"], bool(body.get("echo"))
        with self.lock:
            self.tries[prompt] += 1
            draw = random.Random(f"{self.seed}/{prompt}/{self.tries[prompt]}")
            ways = ANY_REQUEST | (SCORE_REQUEST if is_score else TEXT_REQUEST)
            way = draw.choice(sorted(ways)) if draw.random() < self.share else None
            if prompt in self.refused:
                return 400, {}, b'{"error": {"message": "the prompt is not allowed"}}'
            (self.bad if way else self.good)[way or prompt] += 1
        good = self._good(prompt, is_score)
        return ways[way](good) if way else (200, {}, json.dumps(good).encode())

    def _good(self, prompt: str, is_score: bool) -> Body:
        key = next(key for key in re.findall(r"number \d+", prompt)[-1:] if key in self.texts)
        text, draw = self.texts[key], random.Random(f"{self.seed}/{prompt}")
        if not is_score:
            return {"choices": [{"index": 0, "text": text, "finish_reason": draw.choice(["stop", "length"])}]}
        value = -0.2 if prompt.endswith(text) else -6.0
        # One question is asked with several choices, and alone: all of them in one form.
        logprobs = echoed(prompt, value, random.Random(key).choice(self.offsets))
        return {
            "choices": [
                {"index": 0, "text": prompt + " the", "finish_reason": "length", "logprobs": logprobs}
            ]
        }

    @contextmanager
    def serve(self, port: int = 0) -> Iterator[int]:
        """Answer on 127.0.0.1; yields the port."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize":
                    self.send_error(404)
                    return
                with server.lock:
                    server.in_flight += 1
                    server.most_in_flight = max(server.most_in_flight, server.in_flight)
                try:
                    code, headers, data = server.answer(body)
                finally:
                    with server.lock:
                        server.in_flight -= 1
                self.close_connection = not code or "Content-Length" in headers
                if code:
                    self.send_response(code)
                    for name, value in {"Content-Length": str(len(data)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Connections of a killed client break; that is what is tried."""

        http = Quiet(("127.0.0.1", port), Handler)
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield http.server_port
        finally:
            http.shutdown()
            http.server_close()
