"""Packed weights give the products of plain ones, in every family, cut or not, with adapters or without."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.huge_pages import BLOCK, PAGE, HugePages
from ascendspeed_core.kernels.onednn import OneDnnMatrix, has_packed_product, packed
from ascendspeed_core.kernels.panels import Panels, why_not
from ascendspeed_core.models.linear import LoraLinear, LowRank
from ascendspeed_core.models.lora import AdapterPlan, add_adapters
from ascendspeed_core.models.packed_weight import PackedWeight, pack_weights
from ascendspeed_core.models.projections import join_projections
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import AscendSpeedError
from support.families import REFERENCES
from support.processes import WorkerPool

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.13}
"""Sums in another order; in bf16 results below 32 are rounded by up to 2**-4, twice where a bias is added."""


def packed_as(kind: str, weight: torch.Tensor) -> Panels | OneDnnMatrix:
    """A weight as one of the kinds; skips where this processor or machine lacks it."""
    if kind == "panels":
        reason = why_not(weight.dtype, weight.shape[1])
        if reason is not None:
            pytest.skip(f"no panels on this machine: {reason}")
        return Panels(weight, HugePages())
    if not has_packed_product(weight.dtype, torch.device("cpu")):
        pytest.skip(
            f"oneDNN has no product in {weight.dtype} on this CPU, which test_bf16 shows to be left alone"
        )
    return OneDnnMatrix(packed(weight))


@pytest.mark.parametrize("kind", ["panels", "oneDNN"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 16, 130])
def test_product_and_values(kind: str, dtype: torch.dtype, rows: int) -> None:
    draw = torch.Generator().manual_seed(rows)
    weight = torch.randn(125, 30, generator=draw).to(dtype)
    bias = torch.randn(125, generator=draw).to(dtype)
    x = torch.randn(2, rows, 30, generator=draw).to(dtype)
    whole = packed_as(kind, weight)
    for part, rows_of_part in (
        (PackedWeight(whole), slice(0, 125)),
        (PackedWeight(whole, slice(7, 19)), slice(7, 19)),
    ):
        assert torch.equal(part.plain(), weight[rows_of_part])
        assert (part.shape, part.dtype) == (weight[rows_of_part].shape, dtype)
        assert part.nbytes == weight[rows_of_part].nbytes
        for added in (None, bias[rows_of_part]):
            want = F.linear(x, weight[rows_of_part], added)
            torch.testing.assert_close(F.linear(x, part, added), want, rtol=0, atol=TOLERANCE[dtype])
            assert float(want.float().abs().max()) > 5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(1, 2), (16, 64), (32, 8), (33, 6), (700, 96), (64, 2048), (1000, 34)]
)
def test_a_row_of_panels_has_the_same_bits_in_any_company(
    dtype: torch.dtype, outputs: int, inputs: int
) -> None:
    """Whatever else is multiplied, however rows lie in memory, on one thread or two."""
    draw = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=draw).to(dtype)
    whole = packed_as("panels", weight)
    x = torch.randn(1100, inputs + 5, generator=draw).to(dtype)[:, 3 : inputs + 3]
    alone = torch.cat([whole.product(row.unsqueeze(0), None) for row in x[::37]])
    want = x[::37].double() @ weight.double().T
    # bf16: rounded once to 8 bits; fp32: a sum of up to 2048 products of about 1.
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(alone.double(), want, rtol=tolerance, atol=1e-4)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(whole.product(x, None)[::37], alone)
            assert torch.equal(whole.product(x.T.contiguous().T, None)[::37], alone)
    finally:
        torch.set_num_threads(threads)
    assert whole.product(x[:0], None).shape == (0, outputs)


def test_numbers_that_are_not_finite_stay_what_they_are() -> None:
    weight = torch.eye(32)
    x = torch.zeros(1, 32)
    x[0, 3] = torch.inf
    assert torch.isnan(packed_as("panels", weight).product(x, None)[0, :3]).all()
    x[0, 3] = torch.nan
    assert torch.isnan(packed_as("panels", weight).product(x, None)).all()


def test_pieces_of_large_pages() -> None:
    """They do not overlap, begin where a processor wants them to, and one may be larger than a block."""
    pages = HugePages()
    pieces = [pages.take(count, torch.float32) for count in (3, 1000, BLOCK // 4 + 7, 5, BLOCK // 4 - 16, 9)]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
        assert piece.data_ptr() % 64 == 0
    assert [float(piece.sum()) / len(piece) for piece in pieces] == [0, 1, 2, 3, 4, 5]
    assert pieces[0].data_ptr() % PAGE == 0


def test_what_packed_weights_refuse() -> None:
    whole = packed_as("panels", torch.ones(4, 4))
    weight = PackedWeight(whole)
    with pytest.raises(AscendSpeedError, match=r"no gradient.*torch.no_grad"):
        F.linear(torch.ones(1, 4, requires_grad=True), weight)
    with pytest.raises(AscendSpeedError, match=r"packed weights are for answering.*aten\.mul"):
        torch.mul(weight, 2)
    for x in (torch.ones(1, 5), torch.ones(1, 4).double(), torch.ones(1, 4, device="meta")):
        with pytest.raises(ValueError, match=r"packed weight of torch.float32, \[4, 4\], does not multiply"):
            F.linear(x, weight)
    for bias in (torch.ones(3), torch.ones(4).double(), torch.ones(8)[::2]):
        with pytest.raises(ValueError, match=r"the bias of a packed weight of torch.float32, \[4, 4\], is"):
            F.linear(torch.ones(1, 4), weight, bias)
    assert not has_packed_product(torch.float64, torch.device("cpu"))
    assert not has_packed_product(torch.float32, torch.device("meta"))
    assert why_not(torch.float64, 4) == "they take float32 and bfloat16, not float64"


def plain_and_packed(
    folder: str, layout: Layout, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits of a model before and after its weights are packed, and how many weights are."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, dtype, joined_projections=True).eval()
    tokens = torch.randint(0, 125, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        want = forward_through_stages(model, mesh, ModelInput(tokens))
        pack_weights(model)
        found = forward_through_stages(model, mesh, ModelInput(tokens))
    return found, want, sum(isinstance(parameter, PackedWeight) for parameter in model.parameters())


@pytest.mark.parametrize("name", ["LLaMA with all biases", "Llama 3.2", "Qwen 3", "Baichuan 2 7B", "Bloom"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, pp=2)], ids=str)
def test_logits(workers: WorkerPool, tmp_path: Path, name: str, layout: Layout) -> None:
    """Biases, a tied head, norms inside attention, a normalised head, no joined MLP."""
    REFERENCES[name].save(tmp_path)
    ranks = workers.run(plain_and_packed, layout.world_size, str(tmp_path), layout, torch.float32)
    for found, want, count in ranks:
        # Logits of up to 10, sums of some tens of products in fp32.
        torch.testing.assert_close(found, want, rtol=0, atol=1e-4)
        assert float(want.abs().max()) > 0.5
        assert count > 5


def test_bf16(workers: WorkerPool, tmp_path: Path) -> None:
    REFERENCES["LLaMA 2 70B"].save(tmp_path)
    ((found, want, count),) = workers.run(plain_and_packed, 1, str(tmp_path), Layout(), torch.bfloat16)
    # Three layers, each of which rounds to 8 bits.
    torch.testing.assert_close(found, want, rtol=0, atol=0.1)
    assert count == (3 * 7 + 1 if has_packed_product(torch.bfloat16, torch.device("cpu")) else 0)


def loaded(tmp_path: Path, name: str) -> Transformer:
    REFERENCES[name].save(tmp_path)
    mesh = ParallelMesh(Device("cpu"), Layout())
    return load_model(open_weights(tmp_path), mesh, torch.float32, joined_projections=True).eval()


def test_a_tied_head_takes_no_memory(tmp_path: Path) -> None:
    model = loaded(tmp_path, "Llama 3.2")
    pack_weights(model)
    assert model.output_head is not None
    assert model.embedding is not None
    assert isinstance(model.output_head.weight, PackedWeight)
    assert isinstance(model.output_head.weight.whole, OneDnnMatrix)
    assert model.output_head.weight.whole.whole.data_ptr() == model.embedding.weight.data_ptr()
    assert model.output_head.weight.nbytes == 0
    assert torch.equal(model.output_head.weight.plain(), model.embedding.weight)


def test_joined_layers_hold_one_packed_weight(tmp_path: Path) -> None:
    model = loaded(tmp_path, "LLaMA 2 70B")
    plain = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    pack_weights(model)
    attention = model.layers["1"].attention
    assert (
        attention.q_proj.weight.whole is attention.projections.weight.whole is attention.v_proj.weight.whole
    )
    for name, parameter in model.named_parameters():
        held = parameter.plain() if isinstance(parameter, PackedWeight) else parameter
        assert torch.equal(held, plain[name])


def test_adapters_beside_packed_weights(tmp_path: Path) -> None:
    model = loaded(tmp_path, "LLaMA 2 70B")
    layers = [
        f"layers.{number}.{name}" for number in range(3) for name in ("attention.q_proj", "mlp.down_proj")
    ]
    with torch.device("cpu"):
        add_adapters(model, AdapterPlan({layer: LowRank(2, 0.5) for layer in layers}, frozenset()))
    draw = torch.Generator().manual_seed(8)
    tokens = torch.randint(0, 125, (1, 9), generator=draw)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
        join_projections(model)
        want = model(ModelInput(tokens)).logits
        pack_weights(model)
        torch.testing.assert_close(model(ModelInput(tokens)).logits, want, rtol=0, atol=1e-4)
    adapted = model.layers["0"].mlp.down_proj
    assert isinstance(adapted, LoraLinear)
    assert isinstance(adapted.weight, PackedWeight)
    assert not isinstance(adapted.lora_A.weight, PackedWeight)
