"""Servers, transformers and lm-evaluation-harness: other ways to a model, and to our model."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_eval.model import GenerateRequest, LoglikelihoodRequest
from ascendspeed_eval.openai_server import backend as server_backend
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.transformers_backend import backend as transformers_backend
from support.commands import call
from support.models import save_hugging_face, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_hugging_face(
        tiny_config(vocab_size=400, max_position_embeddings=256), path, tokenizer=tokenizer_folder
    )
    return path


class Server(BaseHTTPRequestHandler):
    """Completions of a language model whose tokens are characters and whose log-probabilities are their codes."""

    seen: list[dict[str, Any]]
    keys: list[str | None]
    failures: int

    def do_POST(self) -> None:
        kind = type(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind.seen.append({**body, "path": self.path})
        kind.keys.append(self.headers.get("Authorization"))
        if kind.failures > 0:
            kind.failures -= 1
            self._reply(503, {"error": "busy"})
        elif body["model"] != "known":
            self._reply(404, {"error": "no such model"})
        elif self.path.endswith("chat/completions"):
            text = body["messages"][0]["content"]
            self._reply(200, {"choices": [{"message": {"content": text.upper()}, "finish_reason": "stop"}]})
        elif body.get("echo"):
            text = body["prompt"] + "!"
            values = [None, *(-float(ord(c)) for c in text[1:])]
            logprobs = {
                "tokens": list(text),
                "text_offset": list(range(len(text))),
                "token_logprobs": values,
                "top_logprobs": [None, *({c: -float(ord(c))} for c in text[1:])],
            }
            self._reply(200, {"choices": [{"text": text, "logprobs": logprobs}]})
        else:
            self._reply(200, {"choices": [{"text": " one\ntwo", "finish_reason": "length"}]})

    def _reply(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Server]]]:
    kind = type("OneServer", (Server,), {"seen": [], "keys": [], "failures": 0})
    http = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}/v1", kind
    http.shutdown()
    http.server_close()


def test_a_server_scores_and_generates(
    server: tuple[str, type[Server]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, kind = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    kind.failures = 1
    with server_backend.open({"base_url": address, "served_model": "known", "concurrency": 2}) as model:
        assert model is not None
        scores = model.loglikelihood([LoglikelihoodRequest("ab ", "c"), LoglikelihoodRequest("ab", " d")])
        # The space at the end of a context counts to the continuation.
        assert [score.logprob for score in scores] == [-(ord(" ") + ord("c")), -(ord(" ") + ord("d"))]
        assert all(score.is_greedy for score in scores)
        (text,) = model.generate([GenerateRequest("p", 5, ("\n",))])
        # The server's limit came after the stop text, which ended the answer.
        assert (text.text, text.finish_reason) == (" one", "stop")
        assert "secret-key" not in str(model.describe())
    assert kind.keys[0] == "Bearer secret-key"
    assert kind.seen[-1]["stop"] == ["\n"]
    assert kind.seen[-1]["max_tokens"] == 5


def test_the_run_command_evaluates_a_server(server: tuple[str, type[Server]], tmp_path: Path) -> None:
    address, kind = server
    (tmp_path / "d.jsonl").write_text(json.dumps({"question": "a?", "answer": "#### 3"}))
    words = [
        "asd-eval",
        "run",
        "--task",
        "gsm8k",
        "--task-data-path",
        tmp_path / "d.jsonl",
        "--num-fewshot",
        0,
    ]
    asked = [*words, "--base-url", address, "--api", "chat"]
    done = call(*asked, "--served-model", "known", "--output-dir", tmp_path / "out")
    assert done.status == 0, done.stderr
    assert kind.seen[0]["path"] == "/v1/chat/completions"
    refused = call(*asked, "--served-model", "other", "--retries", 0)
    assert (refused.status, "status 404" in refused.complaint) == (1, True)
    assert call(*asked).status == 2
    assert "did you mean" not in call(*asked, "--served-model", "x", "--api", "c").complaint
    assert (
        call(*words, "--base-url", "http://127.0.0.1:9/v1", "--served-model", "x", "--retries", 0).status == 1
    )


TEXTS = [("the year", " was"), ("it was a ", "time"), ("of the and", " his her")]


def test_transformers_and_the_engine_agree(folder: Path) -> None:
    ours = LanguageModel.from_pretrained(folder, device="cpu")
    with transformers_backend.open({"transformers_model": str(folder)}) as model:
        theirs = model.loglikelihood([LoglikelihoodRequest(*pair) for pair in TEXTS])
        for mine, reference in zip(ours.loglikelihood(TEXTS), theirs, strict=True):
            # fp32 sums in another order.
            assert mine.logprob == pytest.approx(reference.logprob, abs=1e-4)
            assert mine.is_greedy == reference.is_greedy
        (text,) = model.generate([GenerateRequest("the year", 8)])
    (mine,) = ours.generate("the year", max_new_tokens=8)
    assert (text.text, text.finish_reason) == (mine.text, mine.finish_reason)


def test_our_model_runs_tasks_of_lm_evaluation_harness(folder: Path) -> None:
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval==0.4.13"
    )
    from lm_eval.api.instance import Instance

    from ascendspeed_infer.lm_eval_model import AscendSpeedLM
    from support.lm_eval_tasks import harness_model

    ours, theirs = AscendSpeedLM(folder, device="cpu"), harness_model(folder)

    def ask(kind: str, *args: Any) -> tuple[Any, Any]:
        requests = [Instance(request_type=kind, doc={}, arguments=one, idx=0) for one in args]
        return getattr(ours, kind)(requests), getattr(theirs, kind)(requests)

    mine, reference = ask("loglikelihood", *TEXTS)
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in reference], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in reference]
    text = "the of and to in a is that for it " * 20
    theirs.begins_texts = False
    rolled = ask("loglikelihood_rolling", (text,))
    assert rolled[0] == pytest.approx(rolled[1], rel=1e-6)
    theirs.begins_texts = True
    until = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    made = ask("generate_until", ("the year", until), ("it was", until))
    assert made[0] == made[1]
