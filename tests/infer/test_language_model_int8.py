"""Generation, chat and scoring with int8 weights: what they cost in accuracy, and that everything else stays."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_core.models.int8 import Int8Weight, weights_nbytes
from ascendspeed_data.errors import ConfigError
from ascendspeed_eval.model import LoglikelihoodRequest
from ascendspeed_infer.eval_backend import backend
from ascendspeed_infer.language_model import LanguageModel
from infer.test_loading_adapters import make_adapter
from support.commands import call, run_command
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool
from support.shared_data import STORIES, needs_shared_data
from support.tables import ReportTables

PROMPTS = ["the year", "it was a time of", "中文 and", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A made model whose head is its own, and an adapter; 176 is a width that 16 divides, 24 one that it does not."""
    path = tmp_path_factory.mktemp("int8")
    config = tiny_config(vocab_size=400, hidden_size=64, ffn_hidden_size=176, head_dim=8)
    save_hugging_face(config, path / "hf", tokenizer=tokenizer_folder)
    make_adapter(path / "hf", path / "adapter", target_modules="all-linear")
    return path


def load(folder: Path, quantization: str = "int8", **options: Any) -> LanguageModel:
    return LanguageModel.from_pretrained(
        folder,
        device="cpu",
        weight_quantization=quantization,
        **options,  # type: ignore[arg-type]
    )


@needs_shared_data
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_trained_model_loses(dtype: str, report: ReportTables) -> None:
    """Perplexity of a held-out text within 1.5 %; three in four greedy tokens, up to the first that differs."""
    expected = json.loads((STORIES / "expected.json").read_text(encoding="utf-8"))
    ids = expected["plain_text_ids"]
    losses = {}
    for quantization in ("none", "int8"):
        model = load(STORIES, quantization, dtype=dtype)
        (score,) = model.loglikelihood_of_ids([(ids[:1], ids[1:])])
        losses[quantization] = -score.logprob / (len(ids) - 1)
    assert losses["none"] == pytest.approx(
        expected["plain_text_mean_nll"], abs=1e-5 if dtype == "float32" else 1e-2
    )
    same, count = 0, 0
    for case in expected["cases"]:
        want = case["greedy_ids"][len(case["prompt_ids"]) :]
        (found,) = model.generate(case["prompt_ids"], max_new_tokens=len(want), ignore_eos=True)
        differ = [
            place for place, pair in enumerate(zip(found.token_ids, want, strict=True)) if len(set(pair)) > 1
        ]
        same += min(differ, default=len(want))
        count += len(want)
    worse = losses["int8"] - losses["none"]
    report.add(
        "int8 weights of stories260K", ("dtype", "nats per token", "more with int8", "greedy tokens the same"),
        dtype, losses["none"], worse, f"{same} of {count}",
    )  # fmt: skip
    # Each weight is off by half a step of 1/127 of its row's largest, each product by about 1 %.
    assert 0 < abs(worse) < 0.015
    assert same > 0.75 * count


def answers(folder: str, tp: int, dtype: str) -> list[Any]:
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    model = load(Path(folder), parallel=parallel, dtype=dtype)
    found = model.generate(PROMPTS, max_new_tokens=12)
    drawn = model.generate(PROMPTS, max_new_tokens=8, do_sample=True, seed=3)
    beams = model.generate(PROMPTS[0], max_new_tokens=8, num_beams=3)
    return [one.token_ids for one in (*found, *drawn, *beams)]


def test_tensor_parallel_gives_the_same_texts(workers: WorkerPool, folder: Path) -> None:
    (want,) = workers.run(answers, 1, str(folder / "hf"), 1, "float32")
    for found in workers.run(answers, 2, str(folder / "hf"), 2, "float32"):
        assert found == want


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariant(folder: Path, dtype: str) -> None:
    """Each text the same bit for bit in any company: what the check tries are int8 products of both shapes."""
    model = load(folder / "hf", dtype=dtype)
    held = [one for one in model.model.parameters() if isinstance(one, Int8Weight)]
    assert len(held) == 4 * 7 + 1
    model.check_batch_invariance()
    options: dict[str, Any] = {"max_new_tokens": 10, "batch_invariant": True, "return_log_probs": True}
    together = model.generate(PROMPTS, **options)
    assert together == [model.generate(prompt, **options)[0] for prompt in PROMPTS]
    scores = model.loglikelihood([(prompt, " was good") for prompt in PROMPTS])
    assert scores == [model.loglikelihood([(prompt, " was good")])[0] for prompt in PROMPTS]


def test_an_adapter_merged_and_beside(folder: Path) -> None:
    """Merged, the sum is quantized; beside, the base is: both near the float model with the adapter, far from none."""
    ids = list(range(3, 60))

    def logits(quantization: str, **options: Any) -> torch.Tensor:
        return load(folder / "hf", quantization, **options).logits(ids).float()

    adapter = folder / "adapter"
    want, without = logits("none", adapter=adapter), logits("none")
    for merge in (True, False):
        found = logits("int8", adapter=adapter, merge_adapter=merge)
        # About 1 % of each product through four layers, against an adapter that changes everything.
        assert (found - want).norm() < 0.06 * want.norm()
        assert (found - want).norm() < 0.1 * (without - want).norm()
    beside = load(folder / "hf", adapter=adapter, merge_adapter=False)
    for name, parameter in beside.model.named_parameters():
        assert isinstance(parameter, Int8Weight) == (
            parameter.dim() == 2 and "lora_" not in name and "embedding" not in name
        )


def test_memory_of_the_weights(tmp_path: Path, tokenizer_folder: Path) -> None:
    config = tiny_config(vocab_size=400, hidden_size=256, ffn_hidden_size=704, head_dim=32, num_layers=2)
    save_hugging_face(config, tmp_path / "hf", tokenizer=tokenizer_folder)
    embedding, norms, rows = 400 * 256, 5 * 256, 2 * (256 * 4 + 704 * 2) + 400
    for dtype, size, most in (("float32", 4, 0.31), ("bfloat16", 2, 0.55)):
        whole, held = (weights_nbytes(load(tmp_path / "hf", q, dtype=dtype).model) for q in ("none", "int8"))
        assert whole == config.num_parameters * size
        assert held == config.num_parameters - embedding - norms + (embedding + norms + rows) * size
        assert held < most * whole


def test_on_the_command_line(folder: Path) -> None:
    flags: list[object] = [
        "asd-infer", "generate", "--load", folder / "hf", "--prompt", "the year", "--max-new-tokens", 9,
        "--device", "cpu",
    ]  # fmt: skip
    held = call(*flags, "--weight-quantization", "int8")
    assert held.status == 0, held.stderr
    assert "float32 with int8 matrices, 0." in held.stderr
    (want,) = load(folder / "hf").generate("the year", max_new_tokens=9)
    assert held.stdout == want.text + "\n"
    unknown = call(*flags, "--weight-quantization", "int4")
    assert unknown.status == 2
    narrow = call(*flags, "--weight-quantization", "int8", "--dtype", "float16")
    assert narrow.status == 2
    assert (
        "weight_quantization=int8 computes in bfloat16 or float32 on cpu, not in dtype=float16"
        in narrow.complaint
    )
    spread = run_command(*flags, "--weight-quantization", "int8", "--zero-stage", 3, "--nproc-per-node", 2)
    assert spread.status == 2
    assert "weight_quantization=int8 and zero_stage=3 were both given" in spread.complaint
    trained = call("asd-core", "pretrain", "--load", folder / "hf", "--weight-quantization", "int8")
    assert trained.status == 2
    assert "lacks a flag of this line: --weight-quantization is unknown" in trained.complaint


def test_chat_takes_it(folder: Path) -> None:
    done = call(
        "asd-infer", "chat", "--load", folder / "hf", "--chat-template", "plain", "--max-new-tokens", 4,
        "--device", "cpu", "--weight-quantization", "int8", stdin="the year\nq\n",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert "with int8 matrices" in done.stderr


def test_it_is_part_of_an_evaluated_models_identity(folder: Path) -> None:
    def scored(**options: Any) -> tuple[float, dict[str, str]]:
        with backend.open({"load": str(folder / "hf"), "device": "cpu", **options}) as model:
            (found,) = model.loglikelihood([LoglikelihoodRequest("the year", " was good")])
            return found.logprob, dict(model.describe().details)

    (plain, details), (held, of_held) = scored(), scored(weight_quantization="int8")
    assert of_held == details | {"weight_quantization": "int8"}
    assert held != plain
    assert held == pytest.approx(plain, rel=0.05)


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match="int8 computes in bfloat16 or float32 on cpu, not in dtype=float64"
    ):
        load(folder / "hf", dtype="float64")
    zero = ParallelConfig(zero_stage=3)
    with pytest.raises(ConfigError, match="weight_quantization=int8 and zero_stage=3 were both given"):
        load(folder / "hf", parallel=zero)
