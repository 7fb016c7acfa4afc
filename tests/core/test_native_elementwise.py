"""RMSNorm, rotary embedding and SwiGLU in C++ are the plain ones in float64, and round as these do in bf16."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ascendspeed_core.kernels import native_elementwise as native
from ascendspeed_core.kernels import reference
from ascendspeed_core.models.norm import RMSNorm
from support.tables import ReportTables

pytestmark = pytest.mark.skipif(native.why_not(torch.float32) is not None, reason="there is no C++ compiler")

PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rms_norm": (native.native_rms_norm, reference.rms_norm),
    "rotary": (native.native_rotate, reference.rotate_both),
    "swiglu": (native.native_gated, reference.silu_gated),
    "joined swiglu": (native.native_gated_joined, reference.silu_gated_joined),
}


def strided(draw: random.Random, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor by itself, part of a joined product, of every second row, turned, or with numbers far apart."""
    kind = draw.choice(("whole", "part", "rows", "turned", "apart"))
    *front, size = shape
    if kind == "part":
        first = draw.randint(0, 5)
        return torch.randn(*front, size + first + draw.randint(0, 20)).to(dtype)[..., first : first + size]
    if kind == "rows":
        return torch.randn(front[0], 2 * front[1], *front[2:], size).to(dtype)[:, ::2]
    if kind == "turned":
        return torch.randn(front[1], front[0], *front[2:], size).to(dtype).transpose(0, 1)
    return torch.randn(*shape, 2).to(dtype)[..., 1] if kind == "apart" else torch.randn(shape).to(dtype)


def drawn(operator: str, draw: random.Random, dtype: torch.dtype) -> list[Any]:
    """Arguments of drawn sizes and strides; some calls are large enough for several threads."""
    batch, length = draw.choice((1, 2, 3)), draw.choice((1, 2, 5, draw.randint(1, 40), 130))
    size = draw.choice((8, 15, 16, 17, 63, 64, 65, 128, draw.randint(8, 700)))
    heads = draw.choice(((), (3,)))
    if operator == "rms_norm":
        return [strided(draw, (batch, length, *heads, size), dtype), torch.randn(size).to(dtype), 1e-5]
    if operator == "swiglu":
        return [strided(draw, (batch, length, *heads, size), dtype).mul_(4) for _ in range(2)]
    if operator == "joined swiglu":
        return [strided(draw, (batch, length, 2 * size), dtype)]
    head = draw.choice((2, 6, 16, 30, 32, 64, 80, 128))
    joined = torch.randn(batch, length, 10 * head).to(dtype)
    q, k = (part.view(batch, length, -1, head) for part in joined.split([6 * head, 4 * head], dim=-1))
    if draw.random() < 0.5:
        q, k = (strided(draw, (batch, length, number, head), dtype) for number in (5, 1))
    angles = 3 * torch.randn(draw.choice((1, batch)), length, 1, head)
    if draw.random() < 0.5:
        angles = angles.expand(batch, -1, -1, -1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return [q, k, cos, strided(draw, sin.shape, dtype) if draw.random() < 0.2 else sin]


def results(
    run: Callable[..., Any], arguments: Sequence[Any], wanted: Sequence[int], dtype: torch.dtype | None = None
) -> list[torch.Tensor]:
    """What an operator gives, and the gradients of some of its arguments."""
    given = [
        x.to(dtype or x.dtype).detach().requires_grad_(number in wanted) if isinstance(x, torch.Tensor) else x
        for number, x in enumerate(arguments)
    ]
    # `detach` keeps strides; arithmetic in another format need not.
    made = run(*given)
    made = list(made) if isinstance(made, tuple) else [made]
    generator = torch.Generator().manual_seed(5)
    of_made = [torch.randn(x.shape, generator=generator).to(made[0].dtype) for x in made]
    if arguments[0].dtype == torch.bfloat16:
        of_made = [x.bfloat16().to(made[0].dtype) for x in of_made]
    gradients = torch.autograd.grad(made, [given[number] for number in wanted], of_made)
    return [x.detach() for x in (*made, *gradients)]


def differentiable(operator: str) -> list[int]:
    return [0] if operator == "joined swiglu" else [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", PAIRS)
def test_forward_and_backward(report: ReportTables, operator: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    draw, (ours, plain) = random.Random(operator), PAIRS[operator]
    largest, differing, numbers = [0.0, 0.0], 0, 0
    for _ in range(120):
        arguments, wanted = drawn(operator, draw, dtype), differentiable(operator)
        found = results(ours, arguments, wanted)
        exact = results(plain, arguments, wanted, torch.float64)
        given = len(found) - len(wanted)
        for number, (mine, theirs) in enumerate(zip(found, exact, strict=True)):
            assert mine.dtype == dtype
            # Gradients may be differences of numbers that are nearly equal.
            difference = float((mine.double() - theirs).abs().max() / theirs.abs().max().clamp(min=0.1))
            largest[number >= given] = max(largest[number >= given], difference)
        with torch.no_grad():
            direct = ours(*arguments)
            as_torch = plain(*arguments)
        pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (direct, as_torch)), strict=True)
        for number, (mine, theirs) in enumerate(pairs):
            assert torch.equal(mine, found[number])
            assert mine.is_contiguous()
            differing += int((mine != theirs).sum())
            numbers += mine.numel()
            if dtype == torch.bfloat16:
                # One unit of the last place, which is at most 2^-7 of a number.
                torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=0)
    report.add(
        "Norm, rotary embedding and SwiGLU in C++ against float64, and against plain torch in the same format",
        ("operator", "format", "output", "gradients", "numbers", "other bits than torch"),
        operator, str(dtype), *largest, numbers, differing,
    )  # fmt: skip
    if dtype == torch.float32:
        # A dozen roundings of 2^-24; sums of up to 700 numbers, and over 400 rows for the gradient of a norm's weight.
        assert max(largest) < 5e-6
        return
    # Three roundings of 2^-9 in a row, and sums of them.
    assert max(largest) < 2**-6
    # Means of squares, sums of fp32 in another order, and e^x are rounded otherwise now and then; of these one in 2^16
    # meets a bound between two numbers of bf16. Rotary embedding has neither.
    assert differing <= (0 if operator == "rotary" else numbers / 10_000)


@pytest.mark.parametrize("operator", ["rotary", "swiglu", "joined swiglu"])
def test_gradients_in_bf16_are_those_of_torch(operator: str) -> None:
    """Those of norms are not: torch makes them of other sums."""
    torch.manual_seed(1)
    draw, (ours, plain) = random.Random(operator), PAIRS[operator]
    for _ in range(40):
        arguments, wanted = drawn(operator, draw, torch.bfloat16), differentiable(operator)
        found, theirs = (results(run, arguments, wanted) for run in (ours, plain))
        for mine, other in zip(found[-len(wanted) :], theirs[-len(wanted) :], strict=True):
            if operator == "rotary":
                assert torch.equal(mine, other)
            else:
                # x (1 - sigmoid) is near -1 where the gradient is near 0.
                torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", PAIRS)
def test_threads_do_not_change_a_bit(operator: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    arguments: list[Any] = {
        "rms_norm": [torch.randn(3, 131, 300), torch.randn(300), 1e-6],
        "rotary": [torch.randn(2, 131, 6, 64), torch.randn(2, 131, 2, 64), *torch.randn(2, 1, 131, 1, 64)],
        "swiglu": [*torch.randn(2, 3, 131, 300)],
        "joined swiglu": [torch.randn(3, 131, 600)],
    }[operator]
    arguments = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(PAIRS[operator][0], arguments, differentiable(operator)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_row_does_not_depend_on_those_beside_it() -> None:
    torch.manual_seed(3)
    x, weight, k = torch.randn(1, 700, 4, 64), torch.randn(64), torch.randn(1, 700, 2, 64)
    cos, sin = torch.randn(2, 1, 700, 1, 64)
    normed, gated = native.native_rms_norm(x, weight, 1e-5), native.native_gated(x, x)
    turned = native.native_rotate(x, k, cos, sin)
    for row in (0, 3, 699):
        part = slice(row, row + 1)
        assert torch.equal(native.native_rms_norm(x[:, part], weight, 1e-5), normed[:, part])
        assert torch.equal(native.native_gated(x[:, part], x[:, part]), gated[:, part])
        again = native.native_rotate(x[:, part], k[:, part], cos[:, part], sin[:, part])
        assert all(torch.equal(a, b[:, part]) for a, b in zip(again, turned, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_number_is_where_torch_has_it(dtype: torch.dtype) -> None:
    strange = torch.tensor(
        [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3e38, -3e38, 1e-39, 89.0, -89.0, -100.0]
    )
    x = strange.repeat_interleave(len(strange)).to(dtype)
    y = strange.repeat(len(strange)).to(dtype)
    ours, plain = (results(PAIRS["swiglu"][i], [x, y], [0, 1]) for i in (0, 1))
    for mine, theirs in zip(ours, plain, strict=True):
        # Numbers below 2^-126 may be 0.
        torch.testing.assert_close(mine, theirs, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=2**-126,
                                   equal_nan=True)  # fmt: skip
    rows = torch.randn(len(strange), 40).to(dtype)
    rows[:, 3] = strange
    ours, plain = (
        results(PAIRS["rms_norm"][i], [rows, torch.ones(40, dtype=dtype), 1e-6], [0]) for i in (0, 1)
    )
    torch.testing.assert_close(ours[0], plain[0], rtol=2**-7, atol=0, equal_nan=True)
    # Where squares are infinite but numbers are not, torch multiplies infinity with 0; here gradients are 0.
    seen = strange.abs() != 3e38
    torch.testing.assert_close(ours[1][seen], plain[1][seen], rtol=2**-6, atol=2**-8, equal_nan=True)
    assert not ours[1][~seen].any()
    heads = rows.view(1, len(strange), 1, 40)
    cos, sin = torch.randn(2, 1, len(strange), 1, 40).to(dtype)
    for mine, theirs in zip(*(PAIRS["rotary"][i](heads, heads, cos, sin) for i in (0, 1)), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_of_one_plus_weight(dtype: torch.dtype) -> None:
    """Gemma's, in fp32 between."""
    torch.manual_seed(4)
    norm, x = RMSNorm(48, 1e-6, unit_offset=True).to(dtype), torch.randn(2, 5, 48).to(dtype)
    norm.weight.data.normal_()
    wanted = norm(x)
    norm.normalise = native.native_rms_norm
    # Sums of fp32 in another order.
    torch.testing.assert_close(norm(x), wanted, rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-6)
    norm(x).sum().backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize(
    ("dtype", "device", "size"),
    [
        (torch.float64, "cpu", 32),
        (torch.float16, "cpu", 32),
        (torch.float32, "cpu", 0),
        (torch.bfloat16, "meta", 32),
    ],
    ids=str,
)
def test_what_it_leaves_to_torch(dtype: torch.dtype, device: str, size: int) -> None:
    x = torch.ones(2, 3, 4, size, dtype=dtype, device=device)
    angles, weight = torch.ones(2, 3, 1, size, dtype=dtype, device=device), x[0, 0, 0]
    made = [
        (run(x, weight, 1e-5), *turn(x, x, angles, angles), gated(x, x))
        for run, turn, gated in zip(*(PAIRS[name] for name in ("rms_norm", "rotary", "swiglu")), strict=True)
    ]
    for ours, plain in zip(*made, strict=True):
        assert (ours.shape, ours.dtype, ours.device) == (plain.shape, plain.dtype, plain.device)
        assert device == "meta" or torch.equal(ours, plain)


def test_mixed_formats_and_shapes_are_torchs() -> None:
    x, wide = torch.randn(2, 3, 4, 32).bfloat16(), torch.randn(32)
    assert native.native_rms_norm(x, wide, 1e-5).dtype == torch.float32
    assert native.native_gated(x, wide).shape == x.shape
    cos, sin = torch.randn(2, 2, 3, 4, 32).bfloat16()
    for ours, plain in zip(*(run(x, x, cos, sin) for run in PAIRS["rotary"]), strict=True):
        assert torch.equal(ours, plain)
    trained = torch.randn(2, 3, 1, 32).bfloat16().requires_grad_()
    assert results(native.native_rotate, [x, x, trained, trained], [0, 1, 2, 3])[-1].shape == trained.shape


def test_why_not() -> None:
    assert native.why_not(torch.float16) == "it takes float32 and bfloat16, not float16"
    assert native.why_not(torch.bfloat16) is None


def test_a_second_derivative_is_refused() -> None:
    x, weight = torch.randn(3, 16, requires_grad=True), torch.ones(16)
    (gradient,) = torch.autograd.grad(
        native.native_rms_norm(x, weight, 1e-5).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_recompute_gives_the_same_gradients() -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(2, 9, 64, requires_grad=True), torch.randn(64, requires_grad=True)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return native.native_gated_joined(native.native_rms_norm(x, weight, 1e-5))

    plain = torch.autograd.grad(run(x, weight).sin().sum(), (x, weight))
    again = torch.autograd.grad(checkpoint(run, x, weight, use_reentrant=False).sin().sum(), (x, weight))
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_compiling_sees_plain_torch() -> None:
    x, weight = torch.randn(2, 9, 64), torch.randn(64)
    traced = torch.compile(native.native_rms_norm, backend="eager", fullgraph=True)(x, weight, 1e-5)
    assert torch.equal(traced, reference.rms_norm(x, weight, 1e-5))
