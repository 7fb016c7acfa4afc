"""Answers under DeepSpeed's ZeRO are those of one process, with the same calls."""

import json
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_core.config.load import load_config
from ascendspeed_core.config.parallel import ParallelConfig
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_infer.config import GenerateConfig, inference_layout
from ascendspeed_infer.language_model import LanguageModel
from core.zero_cases import number_afresh
from support.commands import run_command
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool
from support.shared_data import STORIES, needs_shared_data

MODES = {
    "zero3, dp 2": (2, {"zero_stage": 3}),
    "zero1, tp 2": (2, {"zero_stage": 1, "tensor_model_parallel_size": 2}),
    "zero2, dp 2": (2, {"zero_stage": 2}),
    "zero3, tp 2, dp 2": (4, {"zero_stage": 3, "tensor_model_parallel_size": 2}),
}
CALLS: list[dict[str, Any]] = [
    {"max_new_tokens": 12},
    {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "seed": 4, "num_return_sequences": 2},
    {"max_new_tokens": 8, "num_beams": 3},
    {"max_new_tokens": 6, "batch_invariant": True},
]


def answers(
    folder: Path, parallel: dict[str, Any], prompts: list[Any], calls: list[dict[str, Any]]
) -> tuple[list[list[tuple[int, ...]]], int]:
    """New ids of each call, and how many elements of weights are resident between calls."""
    number_afresh()
    model = LanguageModel.from_pretrained(folder, device="cpu", parallel=ParallelConfig(**parallel))
    found = [[one.token_ids for one in model.generate(prompts, **options)] for options in calls]
    held = {id(p): p.numel() or p.ds_tensor.numel() for p in model.model.parameters()}
    return [[tuple(ids) for ids in call] for call in found], sum(held.values())


@needs_shared_data
@pytest.mark.parametrize("mode", MODES)
def test_recorded_greedy_ids(mode: str, workers: WorkerPool) -> None:
    cases = json.loads((STORIES / "expected.json").read_text(encoding="utf-8"))["cases"]
    want = [tuple(case["greedy_ids"][len(case["prompt_ids"]) :]) for case in cases]
    world, parallel = MODES[mode]
    prompts = [case["prompt_ids"] for case in cases]
    call = {"max_new_tokens": len(want[0]), "ignore_eos": True}
    for (found,), _ in workers.run(answers, world, STORIES, parallel, prompts, [call]):
        assert found == want


def test_draws_beams_and_batch_invariant_texts(
    workers: WorkerPool, tmp_path: Path, tokenizer_folder: Path
) -> None:
    config = tiny_config(vocab_size=400, num_layers=2)
    save_hugging_face(config, tmp_path / "model", tokenizer=tokenizer_folder)
    prompts = ["the year", "it was a time of"]
    ((alone, held),) = workers.run(answers, 1, tmp_path / "model", {}, prompts, CALLS)
    assert held == config.num_parameters
    for world, parallel in (MODES["zero3, dp 2"], MODES["zero2, dp 2"]):
        for found, share in workers.run(answers, world, tmp_path / "model", parallel, prompts, CALLS):
            assert found == alone
            # Vectors, and matrices below DeepSpeed's threshold, stay whole once they were put together.
            assert (share < held) == (parallel["zero_stage"] == 3 and share != held)


def test_the_command(tmp_path: Path, tokenizer_folder: Path) -> None:
    save_hugging_face(tiny_config(vocab_size=400), tmp_path / "model", tokenizer=tokenizer_folder)
    (tmp_path / "ds.json").write_text(
        '{"train_batch_size": 8, "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    flags: list[object] = [
        "asd-infer", "generate", "--load", tmp_path / "model", "--device", "cpu", "--max-new-tokens", 8,
        "--prompt", "a", "--prompt", "the year",
    ]  # fmt: skip
    alone = run_command(*flags)
    assert alone.status == 0, alone.stderr
    zero = run_command(
        *flags, "--deepspeed", "--deepspeed_config", tmp_path / "ds.json", "--nproc-per-node", 2
    )
    assert zero.status == 0, zero.stderr
    assert zero.stdout == alone.stdout
    assert f"{tmp_path / 'ds.json'}: no effect without training: train_batch_size" in zero.stderr
    assert "tp1 x pp1 x dp2 + zero3" in zero.stderr


def test_what_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(ConfigError, match="to compute the same 2 times"):
        inference_layout(ParallelConfig(), 2)
    assert inference_layout(ParallelConfig(zero_stage=3), 2).dp == 2
    with pytest.raises(ConfigError, match="which a pipeline's stages would wait for"):
        _ = load_config(
            GenerateConfig, None, {"zero_stage": 3, "pipeline_model_parallel_size": 2, "load": tmp_path}
        ).parallel
    save_hugging_face(tiny_config(vocab_size=400), tmp_path / "model", tokenizer=tokenizer_folder)
    with pytest.raises(AscendSpeedError, match="DeepSpeed needs a process group, even for one process"):
        LanguageModel.from_pretrained(tmp_path / "model", device="cpu", parallel=ParallelConfig(zero_stage=3))
