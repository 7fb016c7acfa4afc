"""The loss made of hidden states, a part of the vocabulary at a time, is that of all logits, in far less memory."""

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.preference import PreferenceConfig
from ascendspeed_core.config.training import ComputeConfig
from ascendspeed_core.kernels.registry import KernelContext, choose
from ascendspeed_core.parallel import cross_entropy as module
from ascendspeed_core.parallel.cross_entropy import LogitsRule, cross_entropy, hidden_cross_entropy
from ascendspeed_core.planner.fit_memory import LiveBytes
from core.attention_options import OPTIONS
from core.dpo_cases import data_config, tune
from core.memory_cases import planned_and_measured
from core.test_layout_equality import TOLERANCE, differences
from core.training_cases import Trained, join_stages, train
from support.models import tiny_config
from support.pairs import LENGTH, make_pairs
from support.processes import WorkerPool
from support.tables import ReportTables

HIDDEN = ComputeConfig(cross_entropy="hidden")

# The order of sums differs; in bf16 the plain loss rounds logits of up to 30 after each change, by up to 0.06, this one
# computes with them in fp32.
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2}


def both(seed: int, dtype: torch.dtype, options: str) -> float:
    """Largest difference of losses and gradients, relative to the largest entry, from those of all logits."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tokens, size, vocabulary = draw.randint(1, 60), draw.randint(1, 40), draw.randint(1, 300)
    hidden = torch.randn(2, tokens, size, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(vocabulary, (2, tokens), generator=generator)
    # Each token has a gradient of its own, as under a mask or in preference tuning.
    factor = torch.randn(2, tokens, generator=generator, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    divisor = (torch.rand(vocabulary, generator=generator, dtype=wide) + 0.5).requires_grad_()
    leaves = [hidden, weight, *([divisor] if "divisor" in options else [])]
    rule = LogitsRule(0.7 if "multiplier" in options else 1.0, 3.0 if "softcap" in options else None)

    logits = F.linear(hidden, weight)
    if "divisor" in options:
        logits = logits / divisor.to(dtype)
    logits = logits * rule.multiplier
    if rule.softcap is not None:
        logits = rule.softcap * (logits / rule.softcap).tanh()
    plain = cross_entropy(logits, targets, vocabulary, None)
    ours = hidden_cross_entropy(
        hidden, weight, leaves[2] if len(leaves) > 2 else None, targets, vocabulary, None, rule, 1
    )
    found = [
        [losses.detach(), *torch.autograd.grad(losses, leaves, factor.to(losses.dtype))]
        for losses in (ours, plain)
    ]
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in zip(*found, strict=True)
    )


@pytest.mark.parametrize(
    "options", ["plain", "divisor", "multiplier, softcap", "divisor, multiplier, softcap"]
)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_losses_and_gradients_are_those_of_all_logits(
    report: ReportTables, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, options: str
) -> None:
    monkeypatch.setattr(module, "LEAST_WIDTH", 7)
    worst = max(both(seed, dtype, options) for seed in range(20))
    report.add(
        "Loss from hidden states against all logits: largest relative difference of losses and gradients",
        ("format", "logits", "cases", "difference"), str(dtype).removeprefix("torch."), options, 20, worst,
    )  # fmt: skip
    assert worst < LIMITS[dtype]


def test_what_is_frozen_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(9, 3)
    losses = hidden_cross_entropy(hidden, weight, None, torch.arange(5), 9, None, LogitsRule())
    losses.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None


MODELS: dict[str, dict[str, Any]] = {
    "LLaMA, tied": {"tie_word_embeddings": True, "vocab_size": 127},
    "caps": OPTIONS["windows, caps and sinks"],
    "multipliers": OPTIONS["norms over all heads"],
    "Baichuan 2": {"normalised_head": True},
    "adapted head": {},
}
LORA = LoraConfig(lora_r=2, lora_alpha=4, lora_target_modules=("all-linear", "lm_head"))
LAYOUTS = {
    "alone": Layout(),
    "tp2 sp": Layout(tp=2, sequence_parallel=True),
    "tp2 pp2": Layout(tp=2, pp=2),
    "cp2": Layout(cp=2),
    "tp4": Layout(tp=4),
    "pp2 dp2 sharded": Layout(pp=2, dp=2, sharded_optimizer=True),
    "pp2 interleaved-zb": Layout(pp=2, schedule="interleaved-zb", layers_per_stage=1),
    "pp2 zbv": Layout(pp=2, schedule="zbv"),
    "pp2 dualpipev": Layout(pp=2, schedule="dualpipev"),
}
QUICK = [
    *((name, "alone") for name in MODELS), ("LLaMA, tied", "tp2 sp"), ("caps", "tp2 pp2"), ("Baichuan 2", "cp2"),
]  # fmt: skip
SWEEP = [
    pytest.param(name, layout, marks=pytest.mark.nightly)
    for name in MODELS
    for layout in LAYOUTS
    if (name, layout) not in QUICK
]


def options_of(name: str) -> dict[str, Any]:
    return {"steps": 3, "lora": LORA if name == "adapted head" else None}


@cache
def plain(name: str) -> Trained:
    torch.set_num_threads(1)
    return train(tiny_config(**MODELS[name]), Layout(), "float64", **options_of(name))


@pytest.mark.parametrize(("name", "layout_name"), [*QUICK, *SWEEP], ids=str)
def test_training_is_that_with_all_logits(
    workers: WorkerPool, report: ReportTables, name: str, layout_name: str
) -> None:
    layout = LAYOUTS[layout_name]
    ranks = workers.run(
        train,
        layout.world_size,
        tiny_config(**MODELS[name]),
        layout,
        "float64",
        compute=HIDDEN,
        **options_of(name),
    )
    found = differences(join_stages(ranks, layout), plain(name))
    report.add(
        "Loss from hidden states, three steps in float64 against one process with all logits: relative difference",
        ("model", "layout", "losses", "grad norm", "first gradients", "weights after"), name, layout_name, *found,
    )  # fmt: skip
    assert all(value <= limit for value, limit in zip(found, TOLERANCE["float64"], strict=True)), found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The prefix of pairs."""
    return make_pairs(tmp_path_factory.mktemp("pairs"), tokenizer_folder)


@pytest.mark.parametrize(
    "layout",
    [Layout(tp=2, pp=2), *(pytest.param(one, marks=pytest.mark.nightly) for one in (Layout(), Layout(cp=2)))],
    ids=str,
)
def test_preference_tuning(workers: WorkerPool, report: ReportTables, pairs: Path, layout: Layout) -> None:
    """DPO needs each answer's log-probability before its loss is known."""
    config = tiny_config(vocab_size=512, num_layers=2, max_position_embeddings=LENGTH)
    given = (config, layout, data_config(pairs, LENGTH), PreferenceConfig())
    got = workers.run(tune, layout.world_size, *given, compute=HIDDEN)
    want = workers.run(tune, layout.world_size, *given)
    for ours, theirs in zip(got, want, strict=True):
        found = differences(ours.trained, theirs.trained)
        assert all(value <= limit for value, limit in zip(found, TOLERANCE["float64"], strict=True)), found
    report.add("DPO, loss from hidden states against all logits, float64: relative difference",
               ("layout", "losses", "grad norm", "first gradients", "weights after"), str(layout), *found)  # fmt: skip


VOCABULARY, WIDTH = 151_936, 64
MEMORY = ("tokens", "loss from", "MB at the peak", "MB of hidden states, head and their gradients")


def test_memory_at_a_large_vocabulary(report: ReportTables) -> None:
    """Qwen's vocabulary: one tensor of all logits in fp32 would be 622 MB."""
    tokens, peaks = 1024, {}
    for name in ("all logits", "hidden states"):
        hidden = torch.randn(tokens, WIDTH, requires_grad=True)
        weight = (torch.randn(VOCABULARY, WIDTH) * 0.1).requires_grad_()
        targets = torch.randint(VOCABULARY, (tokens,))
        own = hidden.nbytes + weight.nbytes
        with LiveBytes() as live:
            if name == "all logits":
                losses = cross_entropy(hidden @ weight.T, targets, VOCABULARY, None)
            else:
                losses = hidden_cross_entropy(hidden, weight, None, targets, VOCABULARY, None, LogitsRule())
            losses.sum().backward()
        peaks[name] = live.peak
        report.add(f"Memory of the loss at a vocabulary of {VOCABULARY:,}, width {WIDTH}, fp32", MEMORY,
                   tokens, name, live.peak / 1e6, 2 * own / 1e6)  # fmt: skip
    # Three tensors of logits that are computed in, 64 MiB each, and the gradients.
    assert peaks["hidden states"] < 4 * (64 << 20) + own
    assert peaks["all logits"] > 2 * tokens * VOCABULARY * 4


@pytest.mark.parametrize(
    "layout",
    [Layout(pp=2), pytest.param(Layout(tp=2, sequence_parallel=True), marks=pytest.mark.nightly)],
    ids=str,
)
def test_memory_is_planned(workers: WorkerPool, layout: Layout) -> None:
    config = tiny_config(num_layers=2, hidden_size=64, ffn_hidden_size=128, vocab_size=2000)
    ranks = workers.run(planned_and_measured, layout.world_size, config, layout, "float32", (2, 2), 64, True)
    ratios = [planned / measured for found in ranks for _, planned, measured in found]
    assert 0.97 < min(ratios) <= max(ratios) < 1.03


def test_auto_takes_it_where_logits_are_large() -> None:
    setting = KernelContext(logits_bytes=1 << 30)
    assert choose("cross_entropy", "auto", setting)[0].name == "hidden"
    implementation, choice = choose("cross_entropy", "auto", replace(setting, logits_bytes=1 << 28))
    assert implementation.name == "torch"
    assert "not hidden: logits of a micro-batch take 0.25 GiB, less than 1" in choice.reason
    with pytest.raises(Exception, match="ZeRO-3 has the head's weight while the head runs only"):
        choose("cross_entropy", "hidden", replace(setting, spreads_weights=True))
