"""Evaluation over HTTP: each sample's log-likelihood and text is, bit for bit, the one computed in process."""

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval==0.4.13")

pytest.importorskip("tenacity", reason="clients of lm-evaluation-harness need it: pip install lm_eval[api]")

from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_data.preprocess import PreprocessJob, preprocess_dataset
from ascendspeed_data.prompting import layout_named
from ascendspeed_eval.model import GenerateRequest, LoglikelihoodRequest
from ascendspeed_eval.openai_server import ServerBackend
from ascendspeed_infer.language_model import LanguageModel
from ascendspeed_infer.lm_eval_model import AscendSpeedLM
from ascendspeed_infer.scoring import encode_pair
from support import peft_adapters
from support.commands import RunningCommand, call
from support.corpus import make_chat_tokenizer, make_texts
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool
from support.served import Running, running_server

SETTINGS = {"until": ["\n\n", "the"], "max_gen_toks": 24, "do_sample": False}


def made_pairs(count: int) -> list[tuple[str, str]]:
    """Contexts, long ones that several samples share too, each with several continuations of one token and more."""
    draw, texts = random.Random(5), make_texts(count, seed=9)
    shared = " ".join(texts[:2])
    pairs = []
    for text in texts:
        context = draw.choice(["", shared + "\n\n"]) + text[: draw.randint(2, 60)]
        pairs += [(context, " " + draw.choice(texts)[: draw.choice([1, 3, 30, 200])]) for _ in range(3)]
    return pairs


def instances(kind: Any, arguments: list[Any]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def harness_results(url: str, folder: str, model: str, pairs: list[tuple[str, str]], concurrency: int) -> Any:
    """What lm-evaluation-harness gets from a server: log-likelihoods, texts, and answers of chats."""
    common = {"model": model, "num_concurrent": concurrency, "max_length": 512, "max_retries": 1}
    completions = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", tokenizer_backend="huggingface", tokenizer=folder, **common
    )
    scores = completions.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    prompts = [(context, dict(SETTINGS)) for context, _ in pairs[::6]]
    texts = completions.generate_until(instances("generate_until", prompts))
    chats = [
        (JsonChatStr(f'[{{"role": "user", "content": "question {n}"}}]'), dict(SETTINGS)) for n in range(8)
    ]
    chat = LocalChatCompletion(base_url=f"{url}/v1/chat/completions", **common)
    return scores, texts, chat.generate_until(instances("generate_until", chats))


def in_process_results(model: LanguageModel, pairs: list[tuple[str, str]]) -> Any:
    own = AscendSpeedLM(model)
    scores = own.loglikelihood(instances("loglikelihood", pairs))
    texts = own.generate_until(
        instances("generate_until", [(context, dict(SETTINGS)) for context, _ in pairs[::6]])
    )
    layout = layout_named("tokenizer", model.tokenizer)
    ends = tuple(dict.fromkeys((*model.eos_token_ids(), *layout.end_ids)))
    chats = []
    for number in range(8):
        (one,) = model.generate(
            layout.ids([{"role": "user", "content": f"question {number}"}]),
            max_new_tokens=24,
            stop=tuple(SETTINGS["until"]),  # type: ignore[arg-type]
            eos_token_ids=ends,
            batch_invariant=True,
        )
        chats.append(one.text)
    return scores, texts, chats


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_chat_tokenizer(path / "tokenizer")
    config = tiny_config(vocab_size=600, max_position_embeddings=512)
    save_hugging_face(config, path / "tiny", tokenizer=path / "tokenizer")
    peft_adapters.make(path / "tiny", path / "a", {"r": 4, "target_modules": ["q_proj", "up_proj"]})
    return path


@pytest.fixture(scope="module")
def run(folder: Path, corpus: Path) -> Path:
    """A training run of a few steps."""
    job = PreprocessJob((str(corpus),), folder / "data", folder / "tokenizer")
    preprocess_dataset(job)
    trained = call(
        "asd-core", "pretrain", "--load", folder / "tiny", "--save", folder / "run", "--data-path",
        job.column_prefix("text"), "--tokenizer-name-or-path", folder / "tokenizer", "--device", "cpu", "--seq-length",
        32, "--micro-batch-size", 2, "--global-batch-size", 2, "--train-iters", 3, "--lr", 1e-3, "--dtype", "float32",
        "--split", "100,0,0",
    )  # fmt: skip
    assert trained.status == 0, trained.stderr
    return folder / "run"


def load(folder: Path) -> LanguageModel:
    return LanguageModel.from_pretrained(folder / "tiny", device="cpu", adapters={"a": folder / "a"})


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return load(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    own = load(folder)
    with running_server(own, layout_named("tokenizer", own.tokenizer), cache_tokens=16384) as running:
        yield running
        running.wait_until_idle()


@pytest.mark.parametrize("concurrency", [1, 32])
@pytest.mark.parametrize("name", ["tiny", "a"])
def test_the_harness_gets_what_it_gets_in_process(
    server: Running, folder: Path, model: LanguageModel, name: str, concurrency: int
) -> None:
    pairs = made_pairs(10)
    with model.with_adapter(None if name == "tiny" else name):
        # Continuations that the model itself would write.
        pairs += [(one, model.generate(one, max_new_tokens=1)[0].text) for one, _ in pairs[::3]]
    pairs = [one for one in pairs if all(encode_pair(model.tokenizer, *one))]
    found = harness_results(server.url, str(folder / "tiny"), name, pairs, concurrency)
    with model.with_adapter(None if name == "tiny" else name):
        want = in_process_results(model, pairs)
    assert found[0] == want[0]
    assert any(greedy for _, greedy in want[0])
    assert found[1] == want[1]
    assert found[2] == want[2]


def test_asd_eval_gets_what_it_gets_in_process(server: Running, model: LanguageModel) -> None:
    """By ids: no boundary of tokens is guessed, and what is cut at the model's length is the same."""
    pairs = [*made_pairs(8), (" ".join(make_texts(30)), " the year"), ("a ", "b")]
    options = {"base_url": f"{server.url}/v1", "served_model": "tiny", "concurrency": 8}
    with ServerBackend().open(options) as opened:
        assert opened is not None
        found = opened.loglikelihood([LoglikelihoodRequest(*one) for one in pairs])
        (text,) = opened.generate([GenerateRequest(pairs[0][0], 20, (), 0.0, 0)])
    want = model.loglikelihood(pairs)
    for one, other in zip(found, want, strict=True):
        assert (one.logprob, one.is_greedy) == (other.logprob, other.is_greedy)  # type: ignore[union-attr]
        assert one.truncated_tokens == other.truncated_tokens  # type: ignore[union-attr]
    assert any(one.truncated_tokens for one in want)
    (same,) = model.generate(pairs[0][0], max_new_tokens=20, batch_invariant=True)
    assert text.text == same.text  # type: ignore[union-attr]


def test_a_score_does_not_depend_on_where_the_context_ends(model: LanguageModel) -> None:
    """A text in two parts, cut at any of its tokens, has the log-probabilities of its tokens one by one."""
    draw = random.Random(2)
    ids = [draw.randrange(3, 600) for _ in range(100)]
    tokens = [model.loglikelihood_of_ids([(ids[:n], ids[n : n + 1])])[0].logprob for n in range(1, len(ids))]
    for cut in (1, 5, 31, 32, 33, 64, 77, 99):
        (whole,) = model.loglikelihood_of_ids([(ids[:cut], ids[cut:])])
        assert whole.logprob == sum(tokens[cut - 1 :]), cut


def in_process_under(folder: str, layout: tuple[int, int], name: str, pairs: list[tuple[str, str]]) -> Any:
    tp, pp = layout
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    adapters = {"a": f"{folder}/a"}
    model = LanguageModel.from_pretrained(
        f"{folder}/run", device="cpu", dtype="float32", parallel=parallel, adapters=adapters
    )
    with model.with_adapter(None if name == "run" else name):
        return in_process_results(model, pairs)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_a_training_checkpoint_under_a_layout(
    workers: WorkerPool, folder: Path, run: Path, layout: tuple[int, int]
) -> None:
    """Trained for a few steps, served by two ranks with an adapter of its own: as both ranks compute it in process."""
    tp, pp = layout
    command = RunningCommand(
        "asd-infer", "serve", "--load", run, "--port", 0, "--device", "cpu", "--dtype", "float32",
        "--batch-invariant", "--lora-modules", f"a={folder / 'a'}", "--nproc-per-node", 2,
        "--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp,
    )  # fmt: skip
    pairs = made_pairs(6)
    try:
        end = time.monotonic() + 240
        while "serving run on " not in command.stderr:
            assert time.monotonic() < end, command.stderr
            time.sleep(0.05)
        url = command.stderr.partition("serving run on ")[2].split()[0]
        for name in ("run", "a"):
            want, *_ = workers.run(in_process_under, 2, str(folder), layout, name, pairs)
            for concurrency in (1, 32):
                found = harness_results(url, str(folder / "tiny"), name, pairs, concurrency)
                assert found == tuple(want), (name, concurrency)
    finally:
        command.kill_session()
