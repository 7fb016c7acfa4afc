"""Gradients reduced beside the backward and parameters gathered late: the same bits, and they do overlap."""

from typing import Any

import pytest
import torch

from ascendspeed_core.config.experts import Experts
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.parallel import ParallelConfig
from core.overlap_cases import outcome, parameters_kept_alive
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "Reduced beside the backward, three steps: how many numbers differ from those of without"
HEADER = (
    "case",
    "layout",
    "format",
    "numbers",
    "that differ",
    "messages of a step",
    "early",
    "gathered late",
)
EXPERTS = Experts(count=4, per_token=2, ffn_hidden_size=32)
LORA = LoraConfig(lora_r=2, lora_alpha=4, lora_target_modules=("all-linear",))
CASES: dict[str, tuple[Layout, str, dict[str, Any], dict[str, Any]]] = {
    "plain": (Layout(dp=3), "float32", {}, {}),
    "sharded, tied, bf16": (
        Layout(dp=3, sharded_optimizer=True), "bfloat16", {"tie_word_embeddings": True}, {"recompute": True},
    ),
    "1f1b": (Layout(pp=2, dp=2, sharded_optimizer=True), "float32", {"tie_word_embeddings": True}, {}),
    "zbv, tied, bf16": (Layout(pp=2, dp=2, schedule="zbv"), "bfloat16", {"tie_word_embeddings": True}, {}),
    "experts": (Layout(dp=4, ep=2), "float32", {"experts": EXPERTS}, {}),
}  # fmt: skip
FURTHER: dict[str, tuple[Layout, str, dict[str, Any], dict[str, Any]]] = {
    "tp sp": (Layout(tp=2, dp=2, sequence_parallel=True, sharded_optimizer=True), "bfloat16", {}, {}),
    "cp": (Layout(cp=2, dp=2, sharded_optimizer=True), "float32", {}, {}),
    "adapters": (Layout(dp=2, sharded_optimizer=True), "float32", {}, {"lora": LORA, "bucket_elements": 300}),
    "interleaved": (
        Layout(pp=2, dp=2, schedule="interleaved", layers_per_stage=1, sharded_optimizer=True), "float32", {}, {},
    ),
    "interleaved-zb": (Layout(pp=2, dp=2, schedule="interleaved-zb", layers_per_stage=1), "bfloat16", {}, {}),
    "dualpipev": (Layout(pp=2, dp=2, schedule="dualpipev", sharded_optimizer=True), "float32", {}, {}),
    "experts, sharded": (Layout(dp=4, ep=2, sharded_optimizer=True), "bfloat16", {"experts": EXPERTS}, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.nightly) for name in FURTHER)]
)
def test_the_bits_are_those_of_without(workers: WorkerPool, report: ReportTables, name: str) -> None:
    layout, dtype, changes, options = (CASES | FURTHER)[name]
    config = tiny_config(**changes)
    got, want = (
        workers.run(outcome, layout.world_size, config, layout, dtype, overlap, **options)
        for overlap in (True, False)
    )
    numbers, differing = 0, 0
    for ours, theirs in zip(got, want, strict=True):
        pairs = [
            (torch.tensor(getattr(ours, one)), torch.tensor(getattr(theirs, one)))
            for one in ("losses", "norms")
        ]
        for found, expected in ((ours.weights, theirs.weights), (ours.state, theirs.state)):
            assert found.keys() == expected.keys()
            pairs += [(found[key], expected[key]) for key in expected]
        numbers += sum(a.numel() for a, _ in pairs)
        differing += sum(int((a != b).sum()) for a, b in pairs)
        assert ours.messages == theirs.messages > 4
        assert (theirs.early, theirs.waiting) == (0, 0)
        # What several stages of a rank use, or few gradients at the very end of the backward, comes last.
        assert ours.early >= ours.messages // 2
        assert (ours.waiting > 4) == layout.sharded_optimizer
    report.add(TITLE, HEADER, name, str(layout), dtype, numbers, differing, got[0].messages, got[0].early,
               got[0].waiting)  # fmt: skip
    assert differing == 0


def test_it_is_on_by_default() -> None:
    layout = ParallelConfig(use_distributed_optimizer=True).layout(2)
    assert (layout.overlap_grad_reduce, layout.overlap_param_gather) == (True, True)
    off = ParallelConfig(overlap_grad_reduce=False, overlap_param_gather=False, ddp_bucket_size=7).layout(2)
    assert (off.overlap_grad_reduce, off.overlap_param_gather, off.bucket_elements) == (False, False, 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_was_trained_is_freed(workers: WorkerPool, dtype: str) -> None:
    layout = Layout(dp=2, sharded_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
    assert workers.run(parameters_kept_alive, 2, tiny_config(), layout, dtype) == [[], []]
