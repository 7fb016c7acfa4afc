"""Implementations of attention give what the plain one gives, forward and backward."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ascendspeed_core.build import apply_kernels, load_model
from ascendspeed_core.config.compute import ComputeConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.mask_rule import attention_mask
from ascendspeed_core.kernels.reference import reference_attention
from ascendspeed_core.kernels.registry import implementations
from ascendspeed_core.kernels.triangle import (
    BLOCK,
    _backward,
    attend_by_blocks,
    blocks,
    computed_share,
    triangle_attention,
)
from ascendspeed_core.models.position import alibi_slopes
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights
from support.models import tiny_config
from support.tables import ReportTables

TITLE = "Triangle attention against scaled_dot_product_attention: largest absolute difference"
HEADER = ("length", "dtype", "output", "gradients", "share of scores computed")

# Outputs are about 1, gradients up to about 10: rounding of each format, sums over up to 4,096 keys.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-1}


def tensors(queries: int, keys: int, dtype: torch.dtype, heads: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(2, heads, queries, 16), (2, heads // 2, keys, 16), (2, heads // 2, keys, 16)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def both(
    name: str, inputs: list[torch.Tensor], mask: torch.Tensor | None, other: str = "sdpa"
) -> tuple[float, float]:
    """Largest difference of outputs and of gradients."""
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=inputs[0].dtype)
    results = []
    for kernel in (implementations("attention")[n] for n in (name, other)):
        out = kernel(*inputs, mask)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, weight)])
    differences = [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
    return differences[0], max(differences[1:])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 7, 64, 1000, 1024, 1025, 4096])
def test_triangle_equals_sdpa(report: ReportTables, length: int, dtype: torch.dtype) -> None:
    found = both("triangle", tensors(length, length, dtype), None)
    share = f"{computed_share(length, length):.3f}"
    report.add(TITLE, HEADER, length, str(dtype).removeprefix("torch."), *found, share)
    assert max(found) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["triangle", "sdpa"])
@pytest.mark.parametrize(("queries", "keys"), [(5, 300), (300, 300), (257, 600)])
@pytest.mark.parametrize("kind", ["alibi", "window", "causal"])
def test_masks_and_earlier_keys(name: str, queries: int, keys: int, kind: str) -> None:
    slopes = torch.tensor(alibi_slopes(4), dtype=torch.float64) if kind == "alibi" else None
    mask = attention_mask(
        queries, keys, 20 if kind == "window" else None, slopes, torch.float64, torch.device("cpu")
    )
    assert max(both(name, tensors(queries, keys, torch.float64), mask, "reference")) < 1e-12


def test_nothing_above_the_diagonal_is_computed() -> None:
    for queries, keys, block in ((1000, 1000, 256), (5, 300, 64), (64, 64, 64)):
        for rows, columns in blocks(queries, keys, block):
            assert columns[-1].stop == keys - queries + rows.stop
            assert [column.start for column in columns[1:]] == [column.stop for column in columns[:-1]]
    assert computed_share(8192, 8192) == pytest.approx(0.5, abs=0.02)


def test_its_arithmetic_is_that_share() -> None:
    """Multiplications of matrices, counted as they run: two in a forward; in a backward the scores once more."""
    q, k, v = tensors(1000, 1000, torch.float32)
    grouped, keys, values = q.unflatten(1, (2, -1)), k.unsqueeze(2), v.unsqueeze(2)
    of_out = torch.ones_like(grouped)

    def counted(run: Callable[[], Any]) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return int(counter.get_total_flops())

    out, log_sum = attend_by_blocks(grouped, keys, values, None, BLOCK)
    context = SimpleNamespace(
        saved_tensors=(grouped, keys, values, None, None, None, out, log_sum), block=BLOCK,
        scale=q.shape[-1] ** -0.5, window=None, softcap=None,
    )  # fmt: skip
    # Multiplications and additions of one product of all queries with all keys.
    whole = 2 * q.shape[0] * q.shape[1] * 1000 * 1000 * q.shape[-1]
    assert counted(lambda: reference_attention(q, k, v, None)) == 2 * whole
    share = computed_share(1000, 1000)
    # Rows of blocks of 256: 256 see 256 keys, 256 see 512, 256 see 768 and 232 see 1,000.
    assert share == 0.625216
    assert counted(lambda: attend_by_blocks._init_fn(grouped, keys, values, None, BLOCK)) == 2 * share * whole
    assert counted(lambda: _backward(context, of_out, None)) == 5 * share * whole


def test_what_lies_above_the_diagonal_is_never_read() -> None:
    q, k, v = tensors(300, 300, torch.float64)
    poisoned_k, poisoned_v = k.detach().clone(), v.detach().clone()
    poisoned_k[:, :, 256:], poisoned_v[:, :, 256:] = torch.nan, torch.nan
    out = triangle_attention(q, poisoned_k, poisoned_v, None)
    want = reference_attention(q, k, v, None)
    torch.testing.assert_close(out[:, :, :256], want[:, :, :256], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["triangle", "reference"])
def test_a_model_computes_the_same(name: str) -> None:
    mesh = ParallelMesh.create(Device("cpu"), Layout())
    logits = []
    for config in (ComputeConfig(), ComputeConfig(attention=name)):
        model = load_model(InitialWeights(tiny_config(), seed=1), mesh, torch.float64)
        choice = apply_kernels(model, config)[0]
        logits.append(model(ModelInput(torch.arange(64).view(2, 32))).logits)
    assert choice.implementation == name
    torch.testing.assert_close(*logits, rtol=1e-12, atol=1e-12)


def test_two_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="triangle_attn and attention=sdpa were both given"):
        ComputeConfig(triangle_attn=True, attention="sdpa")
