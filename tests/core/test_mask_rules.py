"""Attention by rules gives what the whole mask gives, forward and backward, in memory that grows with the length."""

import itertools
import random
import subprocess
import sys
from typing import Any

import pytest
import torch

from ascendspeed_core.kernels import fused_attention
from ascendspeed_core.kernels.flex import flex_attention
from ascendspeed_core.kernels.fused_attention import causal_attention, varlen_attention
from ascendspeed_core.kernels.mask_rule import MaskRule
from ascendspeed_core.kernels.reference import reference_attention
from ascendspeed_core.kernels.registry import implementations
from ascendspeed_core.kernels.triangle import BLOCK, computed_share, triangle_attention
from ascendspeed_core.models.position import alibi_slopes
from ascendspeed_core.planner.fit_memory import LiveBytes
from support import npu_operators
from support.commands import environment
from support.tables import ReportTables

CPU = torch.device("cpu")
TITLE = "Attention by rules against the whole mask: largest absolute difference"
HEADER = ("attention", "rule", "dtype", "cases", "output", "gradients")

# Outputs are about 1, gradients up to about 10, those of sinks sums over all rows: rounding of each format.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-1}
KINDS = ("causal", "window", "alibi", "texts", "texts, window", "texts, alibi", "window, alibi")
CHANGED = ("softcap", "sinks", "texts, window, softcap, sinks")


def packed(length: int, rows: int, draw: random.Random) -> torch.Tensor:
    """Numbers of texts of random lengths, some of a single token."""
    numbers = torch.zeros(rows, length, dtype=torch.int64)
    for row in numbers:
        at = 0
        while at < length:
            size = draw.choice((1, 2, draw.randint(1, 40), draw.randint(1, length)))
            row[at : at + size] = at
            at += size
    return numbers


def case(kind: str, seed: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], MaskRule, dict[str, Any]]:
    """Queries, keys and values, a rule, and options of the implementation, all drawn at random."""
    draw, generator = random.Random(f"{kind}{seed}"), torch.Generator().manual_seed(seed)
    length, rows = draw.choice((1, 7, 300, draw.randint(2, 700))), draw.randint(1, 3)
    heads, groups = draw.choice(((4, 4), (4, 2), (6, 1)))
    shapes = [(rows, heads, length, 16), (rows, groups, length, 16), (rows, groups, length, 16)]
    inputs = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    slopes = torch.tensor(alibi_slopes(heads), dtype=wide) if "alibi" in kind else None
    window = draw.choice((1, 5, 64, 300, 1000)) if "window" in kind else None
    rule = MaskRule(length, CPU, None, slopes, dtype, packed(length, rows, draw) if "texts" in kind else None)
    options: dict[str, Any] = {"scale": 0.3} if draw.random() < 0.5 else {}
    if "softcap" in kind:
        options["softcap"] = 2.0
    if "sinks" in kind:
        options["sinks"] = torch.randn(heads, generator=generator, dtype=dtype).requires_grad_()
    return inputs, rule.within(window) or rule, options


def differences(attend: Any, kind: str, seed: int, dtype: torch.dtype) -> tuple[float, float]:
    """Largest difference from the whole mask's output and gradients."""
    inputs, rule, options = case(kind, seed, dtype)
    leaves = [*inputs, *(x for x in options.values() if isinstance(x, torch.Tensor))]
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = []
    if attend is flex_attention:
        # It has no gradients on a CPU.
        inputs, options = (
            [x.detach() for x in inputs],
            {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in options.items()},
        )
        with torch.no_grad():
            results = [
                f(*inputs, m, **options) for f, m in ((attend, rule), (reference_attention, rule.dense))
            ]
        return float((results[0] - results[1]).abs().max()), 0.0
    for each, mask in ((attend, rule), (reference_attention, rule.dense)):
        out = each(*inputs, mask, **options)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, weight)])
    output, *gradients = (float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    return output, max(gradients)


def check(report: ReportTables, name: str, kind: str, dtype: torch.dtype, seeds: range) -> None:
    results = [differences(implementations("attention")[name], kind, seed, dtype) for seed in seeds]
    worst = [max(one) for one in zip(*results, strict=True)]
    report.add(TITLE, HEADER, name, kind, str(dtype).removeprefix("torch."), len(seeds), *worst)
    assert max(worst) < TOLERANCE[dtype]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sdpa", "triangle", "flex"])
def test_a_rule_is_its_mask(
    report: ReportTables, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    # Smaller than the least mask: rows that are not cut into texts are computed by blocks.
    monkeypatch.setattr(fused_attention, "DENSE_BYTES", 0)
    check(report, name, kind, torch.float64, range(4))


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("name", ["triangle", "flex"])
def test_caps_and_sinks(report: ReportTables, name: str, kind: str) -> None:
    check(report, name, kind, torch.float64, range(4))


@pytest.mark.parametrize("kind", KINDS)
def test_rules_of_npu_attention(report: ReportTables, kind: str) -> None:
    npu_operators.install()
    check(report, "npu", kind, torch.float32, range(4))


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *itertools.product(["sdpa", "triangle", "flex"], KINDS),
        # torch's fused kernels know no caps and sinks.
        *itertools.product(["triangle", "flex"], CHANGED),
    ],
)
def test_many_rules(report: ReportTables, name: str, kind: str, dtype: torch.dtype) -> None:
    check(report, name, kind, dtype, range(100, 140))


def test_texts_are_never_scored_together() -> None:
    """What is no number in one text leaves the others as they are."""
    inputs, rule, _ = case("texts", 3, torch.float64)
    inputs = [x.detach() for x in inputs]
    first = rule.lengths[0][0]
    poisoned = [x.clone() for x in inputs]
    for x in poisoned[1:]:
        x[0, :, :first] = torch.nan
    for attend in (causal_attention, triangle_attention):
        got, want = attend(*poisoned, rule), attend(*inputs, rule)
        assert torch.equal(got[0, :, first:], want[0, :, first:])
        assert torch.equal(got[1:], want[1:])


def test_blocks_outside_a_window_are_left_out() -> None:
    assert computed_share(8192, 8192, BLOCK, 512) < 3 * 512 / 8192


def test_flash_attention_takes_lengths() -> None:
    """FlashAttention by lengths is for CUDA; here its operator checks shapes and makes gradients without values."""
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
    rule = MaskRule(8, CPU, 2, None, torch.bfloat16, segments)
    assert rule.lengths == ((3, 2, 3), (1, 7))
    shapes = ((2, 4, 8, 16), (2, 2, 8, 16), (2, 2, 8, 16))
    inputs = [torch.empty(s, dtype=torch.bfloat16, device="meta", requires_grad=True) for s in shapes]
    out = varlen_attention(*inputs, rule)
    assert out.shape == shapes[0]
    gradients = torch.autograd.grad(out, inputs, torch.empty_like(out))
    assert [gradient.shape for gradient in gradients] == [torch.Size(s) for s in shapes]


MEMORY = (
    "Attention by rules: bytes per token at the peak of a forward and a backward, 2 heads of 16 in float32"
)


def peak_bytes(name: str, kind: str, length: int) -> int:
    """Most bytes of tensors beyond queries, keys, values and their gradients."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 16, generator=generator).requires_grad_() for _ in range(3))
    slopes = torch.tensor(alibi_slopes(2)) if kind == "alibi" else None
    segments = torch.arange(length).div(700, rounding_mode="floor")[None] if kind == "texts" else None
    with LiveBytes() as live:
        rule = MaskRule(length, CPU, None, slopes, torch.float32, segments).within(
            500 if kind == "window" else None
        )
        implementations("attention")[name](q, k, v, rule).sum().backward()
    return live.peak


def check_memory(
    report: ReportTables, monkeypatch: pytest.MonkeyPatch, kind: str, lengths: tuple[int, ...]
) -> None:
    # A mask that is made whole up to a size would only be a constant.
    monkeypatch.setattr(fused_attention, "DENSE_BYTES", 0)
    found = [peak_bytes("sdpa", kind, length) / length for length in lengths]
    for length, each in zip(lengths, found, strict=True):
        report.add(MEMORY, ("rule", "tokens", "bytes per token", "a whole mask's"), kind, length, each,
                   length * (8 if kind == "alibi" else 1))  # fmt: skip
    # Blocks of 256 are more of a short row.
    assert max(found[1:]) <= found[0] * 1.01


@pytest.mark.parametrize("kind", ["texts", "window", "alibi"])
def test_memory_grows_with_the_length(
    report: ReportTables, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    check_memory(report, monkeypatch, kind, (1024, 2048, 4096))


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["texts", "window", "alibi"])
def test_memory_at_64k(report: ReportTables, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """ALiBi's 64k squared scores take minutes."""
    check_memory(report, monkeypatch, kind, (1024, 4096, 16384, 65536))


@pytest.mark.nightly
def test_memory_of_the_process_at_64k(report: ReportTables) -> None:
    """What the fused kernels take for themselves is no tensor: the whole process, of which a mask would be 4 GiB."""
    code = (
        "import resource, torch\n"
        "from ascendspeed_core.kernels.fused_attention import causal_attention\n"
        "from ascendspeed_core.kernels.mask_rule import MaskRule\n"
        "S = 65536\n"
        "q, k, v = (torch.randn(1, 2, S, 16, requires_grad=True) for _ in range(3))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "texts = (torch.arange(S) // 700)[None]\n"
        "rule = MaskRule(S, q.device, None, None, q.dtype, texts)\n"
        "causal_attention(q, k, v, rule).sum().backward()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    report.add(
        "The same, the whole process", ("rule", "tokens", "MiB more"), "texts", 65536, int(done.stdout) / 1024
    )
    assert int(done.stdout) * 1024 < 256 << 20
