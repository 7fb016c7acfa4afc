"""Scores of real checkpoints through the backend: the same under every layout, and those that transformers gives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ascendspeed_data.tokenizer import load_tokenizer
from support.commands import run_command
from support.models import save_hugging_face, tiny_config
from support.shared_data import SHARED_DATA, STORIES, needs_shared_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_hugging_face(
        tiny_config(vocab_size=400, max_position_embeddings=256), path, tokenizer=tokenizer_folder
    )
    return path


def evaluate(
    folder: Path, data: object, output: Path, *flags: object
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    done = run_command(
        "asd-eval", "run", "--task", "boolq", "--task-data-path", data, "--load", folder, "--output-dir", output,
        "--device", "cpu", *flags,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert "toy model" in done.stderr
    lines = (output / "samples.jsonl").read_text().splitlines()
    return json.loads((output / "results.json").read_text()), [json.loads(line) for line in lines]


def theirs(folder: Path, samples: list[dict[str, Any]]) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    found = []
    for sample in samples:
        row = []
        for choice in sample["choices"]:
            before = tokenizer.encode(sample["prompt"])
            ids = tokenizer.encode(sample["prompt"] + choice)
            with torch.no_grad():
                scores = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            row.append(sum(float(scores[place - 1, ids[place]]) for place in range(len(before), len(ids))))
        found.append(row)
    return found


@pytest.mark.parametrize(
    ("tp", "flags"),
    [
        (1, []),
        (2, ["--nproc-per-node", 2, "--tensor-model-parallel-size", 2]),
        (1, ["--nproc-per-node", 2, "--zero-stage", 3]),
        (2, ["--nproc-per-node", 4, "--tensor-model-parallel-size", 2, "--zero-stage", 1]),
    ],
    ids=["alone", "tp2", "zero3", "tp2zero1"],
)
def test_log_likelihoods_under_every_layout_equal_transformers(
    folder: Path, tmp_path: Path, tp: int, flags: list[object]
) -> None:
    results, samples = evaluate(folder, "sample", tmp_path / "out", "--limit", 12, *flags)
    for sample, want in zip(samples, theirs(folder, samples), strict=True):
        # fp32 sums in another order, in padded batches.
        assert sample["logprobs"] == pytest.approx(want, abs=2e-5)
    assert results["model"]["details"]["layout"] == f"tp{tp} x pp1"
    assert results["model"]["num_parameters"] > 0
    assert len(results["model"]["fingerprint"]) == 64


@needs_shared_data
def test_scores_of_a_trained_model_equal_transformers(tmp_path: Path) -> None:
    data = SHARED_DATA / "benchmarks" / "BoolQ" / "dev.jsonl"
    results, samples = evaluate(STORIES, data, tmp_path / "out", "--limit", 20)
    task = results["tasks"]["boolq"]
    assert task["num_samples"] == 20
    whole = [n for n, sample in enumerate(samples) if not sample["truncated_tokens"]]
    assert len(whole) > 5
    wanted = theirs(STORIES, [samples[n] for n in whole])
    for number, want in zip(whole, wanted, strict=True):
        assert samples[number]["logprobs"] == pytest.approx(want, abs=1e-4)
    records = [json.loads(line) for line in data.read_text().splitlines()[:20]]
    assert task["score"] == sum(
        (sample["logprobs"][0] >= sample["logprobs"][1]) == record["answer"]
        for sample, record in zip(samples, records, strict=True)
    ) / 20  # fmt: skip
