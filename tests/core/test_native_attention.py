"""Attention of whole texts in C++ is the plain one in float64, forward and backward, whatever the shapes."""

import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from ascendspeed_core.kernels import native_attention as native
from ascendspeed_core.kernels.mask_rule import MaskRule, attention_mask
from ascendspeed_core.kernels.reference import reference_attention
from ascendspeed_core.parallel.recompute import _keep_products
from support.tables import ReportTables

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    native.why_not(torch.float32, 64) is not None, reason="there is no C++ compiler"
)


def drawn(
    draw: random.Random, dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, MaskRule | None]:
    """Queries, keys and values, what the gradient of the result is, and the rule, all of drawn sizes."""
    head_dim, groups = draw.choice((16, 32, 64, 80, 128)), draw.choice((1, 2, 3))
    heads, batch = groups * draw.choice((1, 2, 4)), draw.choice((1, 2))
    queries = draw.choice((2, 3, 47, 48, 49, 64, 65, draw.randint(2, 300)))
    kind = draw.choice(("whole", "window", "texts", "earlier"))
    keys = queries + (draw.choice((1, 50, 200)) if kind == "earlier" else 0)
    rule = None
    if kind == "window":
        rule = MaskRule(queries, CPU, None, None, dtype, None).within(draw.choice((2, 7, 64, 100)))
    elif kind == "texts":
        ends = sorted(draw.sample(range(1, queries), min(draw.randint(0, 3), queries - 1)))
        texts = torch.zeros(batch, queries, dtype=torch.long)
        for end in ends:
            texts[:, end:] += 1
        rule = MaskRule(queries, CPU, draw.choice((None, 20)), None, dtype, texts)
    # As projections leave them: heads beside each other, and more numbers between tokens.
    wide = [
        torch.randn(batch, length, number + 1, head_dim).to(dtype)[:, :, :number].transpose(1, 2)
        for length, number in ((queries, heads), (keys, groups), (keys, groups))
    ]
    return [x.requires_grad_() for x in wide], torch.randn(batch, heads, queries, head_dim).to(dtype), rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward(report: ReportTables, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    draw, largest = random.Random(str(dtype)), [0.0] * 4
    for _ in range(80):
        inputs, of_out, rule = drawn(draw, dtype)
        out = native.native_attention(*inputs, rule)
        found = (out, *torch.autograd.grad(out, inputs, of_out))
        exact = [x.detach().double().requires_grad_() for x in inputs]
        queries, keys = exact[0].shape[2], exact[1].shape[2]
        mask = None
        if rule is not None:
            mask = attention_mask(queries, keys, rule.window, None, torch.float64, CPU, rule.segments)
        wanted = reference_attention(*exact, mask)
        all_wanted = (wanted, *torch.autograd.grad(wanted, exact, of_out.double()))
        for number, (ours, theirs) in enumerate(zip(found, all_wanted, strict=True)):
            difference = float((ours.detach().double() - theirs.detach()).abs().max())
            # Texts of one token have no gradients of queries and keys.
            size = max(float(theirs.detach().abs().max()), 0.1)
            largest[number] = max(largest[number], difference / size)
    report.add(
        "Attention of whole texts in C++ against float64, largest relative difference",
        ("format", "output", "of queries", "of keys", "of values"), str(dtype), *largest,
    )  # fmt: skip
    # Sums of fp32 over up to 500 keys; bf16 keeps 8 bits of each result. Gradients of scores are differences of numbers
    # that are nearly equal where a text is short.
    assert max(largest) < (2e-5 if dtype == torch.float32 else 2**-6)


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 130, 32) for heads in (4, 2, 2))
    with torch.no_grad():
        whole = native.native_attention(q, k, v, None)
        for first, end in ((0, 130), (100, 130), (64, 130), (128, 130)):
            part = native.native_attention(q[:1, :, first:end], k[:1, :, :end], v[:1, :, :end], None)
            assert torch.equal(part, whole[:1, :, first:end])


def test_what_it_leaves_to_torch() -> None:
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    assert native.why_not(torch.float32, 8) == "it takes heads of a multiple of 16 up to 256, not of 8"
    assert native.why_not(torch.float64, 16) == "it takes float32 and bfloat16, not float64"
    torch.testing.assert_close(native.native_attention(q, k, v, None), reference_attention(q, k, v, None))
    mask = torch.ones(5, 5, dtype=torch.bool).tril().logical_or(torch.eye(5, dtype=torch.bool).roll(1, 0))
    q, k, v = (torch.randn(1, 2, 5, 16) for _ in range(3))
    torch.testing.assert_close(native.native_attention(q, k, v, mask), reference_attention(q, k, v, mask))


def test_selective_recompute_keeps_what_it_gives() -> None:
    calls = []
    call = native._call

    def counted(direction: str, *rest: object) -> None:
        calls.append(direction)
        call(direction, *rest)  # type: ignore[arg-type]

    q, k, v = (torch.randn(1, 2, 33, 16, requires_grad=True) for _ in range(3))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(native, "_call", counted)
        out = checkpoint(
            lambda *x: native.native_attention(*x, None).sin(), q, k, v, use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(_keep_products),
        )  # fmt: skip
        out.sum().backward()
    assert calls == ["forward", "backward"]
