"""Int8 weights: each product gives what the plain one gives, and every layout holds the same integers."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model, parameter_slices
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.kernels import int8, reference
from ascendspeed_core.kernels.npu import INT8_ROWS
from ascendspeed_core.models.int8 import Int8Weight, largest_of_rows, quantize, weights_nbytes
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import InitialWeights, WeightSource, open_weights
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from core.finetune_cases import used_adapters
from core.test_lora import lora
from support import npu_operators
from support.families import REFERENCES
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

CPU = ParallelMesh(Device("cpu"), Layout())

# Relative to the largest result: fp32 sums over some hundred terms in another order; a sum rounded to 16 bits before
# and after it is scaled (bf16 keeps 8 bits, fp16 11).
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SIZES = [(96, 64), (172, 64), (64, 172), (1, 16), (5, 48), (0, 32), (1500, 1024), (7, 3)]
"""Output and input: odd rows, columns that 16 does not divide, a device without rows, several blocks."""


def weight_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    # Rows of several lengths.
    lengths = torch.rand(rows, 1, generator=generator) + 0.01
    return (torch.randn(rows, columns, generator=generator) * lengths).to(dtype)


def quantized(weight: torch.Tensor) -> Int8Weight:
    return quantize(weight, largest_of_rows(weight), int8.Workspace())


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if not theirs.numel():
        return 0.0
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_that_of_the_plain_one(size: tuple[int, int], dtype: torch.dtype) -> None:
    weight = quantized(weight_of(*size, dtype))
    for rows in (1, 2, 16, 17, 100):
        x = torch.randn(rows, size[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
        want = reference.int8_linear(x, weight.integers, weight.scale)
        chosen = int8.int8_linear(x, weight.integers, weight.scale)
        assert chosen.dtype == dtype
        assert difference(chosen, want) < TOLERANCE[dtype]
        assert difference(int8.wide_linear(x, weight.integers, weight.scale), want) < TOLERANCE[dtype]
        if size[1] % int8.INTEGER_COLUMNS == 0 and size[0]:
            assert difference(int8.integer_linear(x, weight.integers, weight.scale), want) < TOLERANCE[dtype]
    x = torch.randn(2, 3, 1, size[1]).to(dtype)
    assert int8.int8_linear(x, weight.integers, weight.scale).shape == (2, 3, 1, size[0])


def test_which_product_is_taken() -> None:
    def chosen(rows: int, dtype: torch.dtype, columns: int = 64) -> str:
        return int8.implementation_for(
            torch.empty(rows, columns, dtype=dtype), torch.empty(8, columns, dtype=torch.int8)
        )

    assert [chosen(rows, torch.bfloat16) for rows in (0, 1, 16, 17)] == ["wide", "integer", "integer", "wide"]
    assert chosen(1, torch.float32) == "wide"
    # torch's operator would read past the end of each row.
    assert chosen(1, torch.bfloat16, 172) == "wide"
    assert {"npu", "integer", "wide"} == set(int8.IMPLEMENTATIONS)


def test_threads_share_a_model() -> None:
    """Each thread makes its blocks wide in memory of its own; formats and sizes may follow one another."""
    workspace = int8.Workspace()
    weights = [quantized(weight_of(rows, 500)) for rows in (300, 9000)]
    x = torch.randn(3, 500)

    def products(_: int) -> list[torch.Tensor]:
        return [int8.wide_linear(x, weight.integers, weight.scale, workspace) for weight in weights]

    want = products(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(products, range(24)):
            assert all(difference(a, b) < TOLERANCE[torch.float32] for a, b in zip(found, want, strict=True))
    with torch.inference_mode():
        ours = int8.wide_linear(x.bfloat16(), weights[0].integers, weights[0].scale.bfloat16(), workspace)
    assert difference(ours, want[0]) < TOLERANCE[torch.bfloat16]
    assert difference(products(0)[1], want[1]) < TOLERANCE[torch.float32]


def test_activations_that_begin_anywhere() -> None:
    """torch's operator ends the process where they are not aligned, so they must be copied before."""
    weight = quantized(weight_of(32, 64, torch.bfloat16))
    whole = torch.randn(5 * 64 + 8).bfloat16()
    for start in (0, 1, 4, 8):
        x = whole[start : start + 64].view(1, 64)
        want = reference.int8_linear(x, weight.integers, weight.scale)
        assert difference(int8.int8_linear(x, weight.integers, weight.scale), want) < 2**-7
    turned = whole[: 5 * 64].view(64, 5).T
    want = reference.int8_linear(turned, weight.integers, weight.scale)
    assert difference(int8.int8_linear(turned, weight.integers, weight.scale), want) < 2**-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [96, INT8_ROWS + 3])
def test_the_operator_of_an_npu(rows: int, dtype: torch.dtype) -> None:
    """torch_npu's own schema and a CPU kernel written from its documentation: the call fits, heads are cut."""
    npu_operators.install()
    weight = quantized(weight_of(rows, 24, dtype))
    x = torch.randn(3, 24).to(dtype)
    found = int8.IMPLEMENTATIONS["npu"](x, weight.integers, weight.scale)
    assert difference(found, reference.int8_linear(x, weight.integers, weight.scale)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_weight_is_the_nearest_of_its_row(dtype: torch.dtype) -> None:
    weight = weight_of(60, 300, dtype)
    weight[7] = 0
    weight[8] = torch.linspace(-127, 127, 300).round().to(dtype)
    held = quantized(weight)
    assert held.integers.dtype == torch.int8
    assert held.scale.dtype == held.dtype == dtype
    assert held.shape == weight.shape
    assert int(held.integers.abs().max()) == 127
    scale = held.scale.float().unsqueeze(-1)
    off = (weight.float() - held.integers.float() * scale).abs()
    # fp32 division rounds a weight half-way between two integers either way.
    assert bool((off <= scale * (0.5 + 1e-5)).all())
    largest = weight.float().abs().amax(-1)
    largest[7] = 127
    torch.testing.assert_close(held.scale.float(), largest / 127, rtol=2**-8, atol=0)
    assert torch.equal(held.integers[8].float(), weight[8].float())
    assert not held.integers[7].any()
    torch.testing.assert_close(
        held.row_lengths(), (held.integers.float() * scale).norm(dim=-1), rtol=1e-5, atol=0
    )
    assert held.nbytes == 60 * 300 + 60 * dtype.itemsize


def with_its_own_weights(plain: Transformer, held: Transformer) -> Transformer:
    """Put into a model what the integers of another stand for."""
    theirs = dict(held.named_parameters())
    for name, parameter in plain.named_parameters():
        other = theirs[name]
        if isinstance(other, Int8Weight):
            parameter.data = other.integers.float() * other.scale.float().unsqueeze(-1)
        else:
            assert torch.equal(parameter, other), name
    return plain


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", REFERENCES)
def test_a_model_computes_what_its_integers_say(name: str, joined: bool, tmp_path: Path) -> None:
    """Biases, norms, a head of rows of length one: all that is not a product is as in the plain model."""
    REFERENCES[name].save(tmp_path)
    check_model(open_weights(tmp_path), joined)


@pytest.mark.parametrize("joined", [False, True])
def test_an_adapter_beside_the_integers_keeps_its_format(joined: bool) -> None:
    source = used_adapters(InitialWeights(tiny_config(), seed=3), lora())
    held = load_model(source, CPU, torch.float32, joined, weight_quantization="int8")
    for name, parameter in held.named_parameters():
        assert not ("lora_" in name and isinstance(parameter, Int8Weight))
    check_model(source, joined)
    base = load_model(source.base, CPU, torch.float32, joined, weight_quantization="int8")
    assert difference(logits_of(base), logits_of(held)) > 1e-3


def tokens() -> torch.Tensor:
    return torch.randint(0, 125, (2, 21), generator=torch.Generator().manual_seed(1))


def logits_of(model: Transformer) -> torch.Tensor:
    logits: torch.Tensor = model(ModelInput(tokens())).logits
    return logits


@torch.no_grad()
def check_model(source: WeightSource, joined: bool) -> None:
    held = load_model(source, CPU, torch.float32, joined, weight_quantization="int8")
    plain = load_model(source, CPU, torch.float32)
    quantized = {name for name, one in held.named_parameters() if isinstance(one, Int8Weight)}
    matrices = {n for n, one in plain.named_parameters() if one.dim() == 2 and "lora_" not in n}
    assert quantized == matrices - {"embedding.weight"}
    as_stored = logits_of(plain)
    want = logits_of(with_its_own_weights(plain, held))
    # fp32 sums in another order, through three or four layers.
    assert difference(logits_of(held), want) < 2e-5
    assert 1e-4 < difference(want, as_stored) < 0.2
    assert weights_nbytes(held) < 0.6 * weights_nbytes(plain)


LAYOUTS = [Layout(tp=2), Layout(tp=4), Layout(pp=2), Layout(tp=2, pp=2)]
CONFIG = tiny_config(vocab_size=125, num_key_value_heads=2, qkv_bias=True)
Held = dict[str, tuple[Any, torch.Tensor, torch.Tensor]]


def held_under(layout: Layout, dtype: torch.dtype, joined: bool) -> tuple[Held, torch.Tensor]:
    """Of each quantized weight the part that this process holds, its integers and scales; and the logits."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    source = InitialWeights(CONFIG, seed=3)
    model = load_model(source, mesh, dtype, joined, weight_quantization="int8")
    parts = parameter_slices(model, mesh)
    held = {
        name: (parts[name].index, weight.integers, weight.scale)
        for name, weight in model.named_parameters()
        if isinstance(weight, Int8Weight)
    }
    logits = forward_through_stages(model, mesh, ModelInput(tokens()))
    return held, gather_logits(logits, CONFIG.vocab_size, mesh.group("tp"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_holds_the_same_integers(
    workers: WorkerPool, layout: Layout, dtype: torch.dtype, report: ReportTables
) -> None:
    ((whole, want),) = workers.run(held_under, 1, Layout(), dtype, False)
    seen: dict[str, int] = {}
    ranks = workers.run(held_under, layout.world_size, layout, dtype, True)
    found = max(difference(logits, want) for _, logits in ranks)
    report.add(
        "int8 weights: logits against one process, relative to the largest", ("layout", "dtype", "difference"),
        layout, str(dtype).removeprefix("torch."), found,
    )  # fmt: skip
    # Sums in another order, through four layers; bf16 rounds each of them to 8 bits.
    assert found < (1e-5 if dtype == torch.float32 else 5e-2)
    for held, _ in ranks:
        for name, (index, integers, scale) in held.items():
            assert torch.equal(integers, whole[name][1][index]), name
            assert torch.equal(scale, whole[name][2][index[0]]), name
            seen[name] = seen.get(name, 0) + integers.numel()
    for name, (_, integers, _) in whole.items():
        assert seen[name] >= integers.numel(), name


def test_what_is_refused(tmp_path: Path) -> None:
    source = InitialWeights(tiny_config(), seed=3)
    for dtype in (torch.float64, torch.float16):
        with pytest.raises(
            ConfigError, match="int8 computes in bfloat16 or float32 on cpu, not in dtype=float"
        ):
            load_model(source, CPU, dtype, weight_quantization="int8")
    with pytest.raises(ConfigError, match="on npu, not in dtype=float32"):
        int8.refuse_missing_format(torch.float32, Device("npu"))
    spread = ParallelMesh(Device("cpu"), Layout(zero_stage=3))
    with pytest.raises(ConfigError, match="weight_quantization=int8 and zero_stage=3 were both given"):
        load_model(source, spread, torch.float32, zero_settings={}, weight_quantization="int8")
    broken = weight_of(4, 16)
    broken[2, 3] = torch.nan
    with pytest.raises(AscendSpeedError, match=r"x\.weight holds numbers that are not finite"):
        quantize(broken, largest_of_rows(broken), int8.Workspace(), "x.weight")


def test_int8_weights_are_not_trained() -> None:
    model = load_model(InitialWeights(tiny_config(), seed=3), CPU, torch.float32, weight_quantization="int8")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not logits_of(model).requires_grad
    assert model.embedding is not None
    model.embedding.weight.requires_grad_()
    with pytest.raises(AscendSpeedError, match="int8 weights have no gradient"):
        logits_of(model)
    weight = model.layers["0"].get_submodule("mlp.up_proj").weight
    with pytest.raises(AscendSpeedError, match=r"only F\.linear takes them, not aten\.mul"):
        weight * 2  # type: ignore[operator]
