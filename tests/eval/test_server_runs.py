"""Runs on a server: what is sent, what is kept, what a report says of answers that were cut, and when a run ends."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from support.commands import Finished, call

RECORDS = [{"question": f"What is {n}?", "answer": f"#### {n}"} for n in range(6)]


class Server:
    """Answers each chat message by a function; keeps what was asked and with which headers."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status, self.told = 200, ""
        self.message: dict[str, Any] = {"content": "The answer is 1."}
        self.finish_reason: str | None = "stop"

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"choices": [{"message": self.message, "finish_reason": self.finish_reason}]}


@pytest.fixture
def server() -> Iterator[tuple[Server, list[str]]]:
    own = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            own.bodies.append(body)
            own.headers.append(dict(self.headers))
            data = own.told.encode() if own.told else json.dumps(own.reply(body)).encode()
            self.send_response(own.status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    # Two addresses of one server.
    https = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    for http in https:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield own, [f"http://127.0.0.1:{http.server_port}/v1" for http in https]
    for http in https:
        http.shutdown()
        http.server_close()


def run(folder: Path, address: str, *flags: object, records: list[dict[str, Any]] = RECORDS) -> Finished:
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in records))
    return call(
        "asd-eval", "run", "--task", "gsm8k", "--num-fewshot", 0, "--task-data-path", data, "--base-url", address,
        "--served-model", "m", "--api", "chat", "--retries", 0, "--output-dir", folder / "out", *flags,
    )  # fmt: skip


def everything_written(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted((folder / "out").iterdir()))


def test_further_keys_and_headers_are_sent(server: tuple[Server, list[str]], tmp_path: Path) -> None:
    own, (address, _) = server
    extra = {
        "chat_template_kwargs": {"enable_thinking": False},
        "max_completion_tokens": 99,
        "temperature": None,
    }
    done = run(
        tmp_path, address, "--extra-body", json.dumps(extra), "--header", "X-Key: very-secret", "X-Other: 1"
    )
    assert done.status == 0, done.stderr
    for body, headers in zip(own.bodies, own.headers, strict=True):
        assert body["chat_template_kwargs"] == {"enable_thinking": False}
        assert body["max_completion_tokens"] == 99
        assert "max_tokens" not in body
        assert "temperature" not in body
        assert (headers["X-Key"], headers["X-Other"]) == ("very-secret", "1")
    assert "very-secret" not in everything_written(tmp_path) + done.stderr + done.stdout
    assert "temperature is left out" in done.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model_details"]["extra_body"]
    other = run(tmp_path, address, "--extra-body", '{"top_k": 1}')
    assert (other.status, "extra_body" in other.complaint) == (1, True)


def test_conversations_are_sent_as_messages(server: tuple[Server, list[str]], tmp_path: Path) -> None:
    own, (address, _) = server
    own.message = {"content": "<think>It is 1. No.</think>\n\nThe answer is 1."}
    values = '{"enable_thinking": true}'
    flags = ("--apply-chat-template", "--system", "Be brief.", "--chat-template-kwargs", values)
    done = run(tmp_path, address, *flags, "--num-fewshot", 1)
    assert done.status == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    for body, line in zip(sorted(own.bodies, key=lambda body: str(body["messages"][-1])), lines, strict=True):
        assert [one["role"] for one in body["messages"]] == ["system", "user", "assistant", "user"]
        assert body["messages"][0]["content"] == "Be brief."
        assert body["messages"] == line["messages"] == json.loads(line["prompt"])
        assert body["chat_template_kwargs"] == {"enable_thinking": True}
        assert "stop" not in body
        assert line["outputs"] == ["The answer is 1."]
        assert line["removed"] == ["<think>It is 1. No.</think>\n\n"]
        assert line["marks"] == ["reasoning"]
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]["chat"]
    assert settings["system"] == "Be brief."
    own.message = {"content": "The answer is 1.", "reasoning_content": "Kept apart."}
    (other := tmp_path / "other").mkdir()
    assert run(other, address, "--apply-chat-template").status == 0
    first = json.loads((other / "out" / "samples.jsonl").read_text().split("\n")[0])
    assert (first["outputs"], first["removed"]) == (["The answer is 1."], ["Kept apart."])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--system", "Hi"), "system=Hi means nothing without --apply-chat-template"),
        (("--no-fewshot-as-multiturn",), "means nothing without --apply-chat-template"),
        (("--apply-chat-template", "--api", "completions"), "api=completions takes texts"),
        (("--apply-chat-template", "--chat-template-kwargs", "[1]"), "is no JSON object"),
        (("--apply-chat-template", "--chat-template-date", "soon"), "is not a day"),
        (("--apply-chat-template", "--chat-template-date", "today"), "the server renders the chat template"),
        (
            (
                "--apply-chat-template", "--chat-template-kwargs", '{"a": 1}', "--extra-body",
                '{"chat_template_kwargs": {"a": 2}}',
            ),
            "keep one",
        ),
    ],
)  # fmt: skip
def test_options_of_conversations_are_checked(
    server: tuple[Server, list[str]], tmp_path: Path, flags: tuple[str, ...], said: str
) -> None:
    own, (address, _) = server
    done = run(tmp_path, address, *flags)
    assert done.status != 0
    assert said in done.complaint
    assert own.bodies == []


def test_secrets_that_a_server_repeats_are_left_out(
    server: tuple[Server, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, (address, _) = server
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    own.status, own.told = 401, '{"error": "wrong key sk-very-secret or token-xyz"}'
    done = run(tmp_path, address.replace("//", "//user:password@"), "--header", "X-Key: token-xyz")
    assert done.status == 1
    assert "status 401" in done.complaint
    written = done.stderr + everything_written(tmp_path)
    assert not any(secret in written for secret in ("sk-very-secret", "token-xyz", "password"))


def test_a_run_goes_on_at_another_address(server: tuple[Server, list[str]], tmp_path: Path) -> None:
    own, (first, second) = server
    own.reply = lambda body: (  # type: ignore[method-assign]
        {"choices": []} if "What is 3" in str(body["messages"]) else Server.reply(own, body)
    )
    done = run(tmp_path, first)
    assert done.status == 1
    assert "1 samples failed and have no score" in done.complaint
    assert len(own.bodies) == 6
    own.reply = lambda body: Server.reply(own, body)  # type: ignore[method-assign]
    done = run(tmp_path, second)
    assert done.status == 0, done.stderr
    assert len(own.bodies) == 7
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["tasks"]["gsm8k"]["num_failed"] == 0
    assert results["model"]["details"]["server"] == second + "/"


CUT: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "cut": ({"content": "So we"}, "length", "6 of 6 answers reached the length limit (max_new_tokens=128)"),
    "cut while thinking": (
        {"content": None, "reasoning_content": "Hm"},
        "length",
        "6 of 6 answers hold only reasoning",
    ),
    "thinking alone": ({"content": "<think>Is it 4"}, "length", "6 of 6 answers never end their reasoning"),
    "withheld": ({"content": None}, "content_filter", "6 of 6 answers were withheld by a filter"),
    "refused": ({"content": None, "refusal": "No."}, "stop", "6 of 6 answers were refused"),
    "empty": ({"content": ""}, "stop", "6 of 6 answers are empty"),
}


@pytest.mark.parametrize("case", CUT)
def test_answers_that_are_none_are_counted(
    server: tuple[Server, list[str]], tmp_path: Path, case: str
) -> None:
    own, (address, _) = server
    own.message, own.finish_reason, said = CUT[case]
    done = run(tmp_path, address)
    assert done.status == 0, done.stderr
    assert said in (tmp_path / "out" / "report.md").read_text()
    assert said in done.stderr
    assert "without them (0 samples)" in done.stderr
    for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines():
        assert json.loads(line)["finish_reasons"] == ["refusal" if case == "refused" else own.finish_reason]


def test_the_score_is_shown_with_and_without_cut_answers(
    server: tuple[Server, list[str]], tmp_path: Path
) -> None:
    own, (address, _) = server

    def reply(body: dict[str, Any]) -> dict[str, Any]:
        number = int(str(body["messages"][0]["content"]).split()[-1].rstrip("?"))
        text = f"The answer is {number}. " if number < 3 else "Let us see: 10 + 3 = 13 and so"
        reason = "stop" if number < 4 else "length"
        return {"choices": [{"message": {"content": text}, "finish_reason": reason}]}

    own.reply = reply  # type: ignore[method-assign]
    done = run(tmp_path, address)
    assert done.status == 0, done.stderr
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]["gsm8k"]
    assert (entry["score"], entry["score_of_complete"], entry["num_complete"]) == (0.5, 0.75, 4)
    assert entry["finish_reasons"] == {"length": 2, "stop": 4}
    assert "the score is 0.5000 with these answers and 0.7500 without them (4 samples)" in done.stderr


def test_a_server_that_is_gone_ends_the_run(server: tuple[Server, list[str]], tmp_path: Path) -> None:
    own, (address, _) = server
    own.status = 503
    records = [{"question": f"What is {n}?", "answer": f"#### {n}"} for n in range(60)]
    done = run(tmp_path, address, "--max-failures", 5, "--concurrency", 2, records=records)
    assert done.status == 1
    assert "5 samples failed one after the other" in done.complaint
    assert len(own.bodies) <= 8
    assert not (tmp_path / "out" / "results.json").exists()


def test_half_an_emoji_is_kept_and_shown(server: tuple[Server, list[str]], tmp_path: Path) -> None:
    own, (address, _) = server
    own.message = {"content": "It is \ud83d 1"}
    assert run(tmp_path, address).status == 0
    done = run(tmp_path, address)
    assert done.status == 0, done.stderr
    assert "6 of 6 samples are finished" in done.stderr
    for line in (tmp_path / "out" / "samples.jsonl").read_bytes().decode().splitlines():
        assert json.loads(line)["outputs"] == ["It is \ud83d 1"]
    assert call("asd-eval", "compare", tmp_path / "out", tmp_path / "out").status == 0
