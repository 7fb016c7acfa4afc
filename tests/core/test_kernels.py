"""Each implementation of each operator gives what the plain one gives, forward and backward, or says why it cannot."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from ascendspeed_core.build import apply_kernels, kernel_context, load_model
from ascendspeed_core.config.batch import BatchConfig
from ascendspeed_core.config.compute import KERNELS, ComputeConfig
from ascendspeed_core.config.finetune import FinetuneDataConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.optimizer import OptimizerConfig
from ascendspeed_core.config.training import DataConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.kernels import int8, liger, native_attention, native_elementwise, npu
from ascendspeed_core.kernels.mask_rule import attention_mask
from ascendspeed_core.kernels.reference import GatedFunction, silu_gated_joined
from ascendspeed_core.kernels.registry import (
    JOINED_GATED,
    OPERATORS,
    UNPERMUTE,
    KernelContext,
    choose,
    implementations,
    table,
    update_choice,
)
from ascendspeed_core.models.linear import LoraLinear, LowRank
from ascendspeed_core.models.mlp import SwiGLU
from ascendspeed_core.models.position import alibi_slopes
from ascendspeed_core.objectives.next_token import NextTokenLoss
from ascendspeed_core.optim.native_engine import NativeEngine
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.step import forward_backward
from ascendspeed_core.weights import InitialWeights
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from support import npu_operators
from support.models import tiny_config
from support.tables import ReportTables

TITLE = (
    "Implementations of operators against the plain ones: largest difference, relative to the largest value"
)
HEADER = ("operator", "implementation", "dtype", "output", "gradients")
CPU = ParallelMesh(Device("cpu"), Layout())
NPU = KernelContext(Device("npu"), torch.bfloat16, seq_length=64, micro_batch_tokens=128)

# Unit round-off of each format times the handful of roundings and the sums over some hundred terms between them.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2e-2}


def inputs(operator: str, dtype: torch.dtype) -> list[Any]:
    """Arguments of an operator; the floating ones want gradients unless they are constants of it."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    if operator == "attention":
        return [draw(2, 4, 64, 16), draw(2, 2, 64, 16), draw(2, 2, 64, 16), None]
    if operator == "scaled_masked_softmax":
        return [draw(2, 4, 64, 64), torch.ones(64, 64, dtype=torch.bool).tril(), 0.25]
    if operator == "rms_norm":
        return [draw(2, 9, 32), draw(32), 1e-5]
    if operator == "layer_norm":
        return [draw(2, 9, 32), draw(32), draw(32), 1e-5]
    if operator == "rotary":
        angles = draw(2, 9, 1, 8).detach().repeat(1, 1, 1, 2)
        return [draw(2, 9, 4, 16), draw(2, 9, 2, 16), angles.cos(), angles.sin()]
    if operator == "swiglu":
        return [draw(2, 9, 32), draw(2, 9, 32)]
    if operator == "grouped_product":
        # One expert has no rows.
        weights = [draw(24, 16) for _ in range(4)]
        return [draw(13, 16), weights, [5, 0, 7, 1]]
    if operator == "token_permutation":
        chosen = torch.stack([torch.randperm(5, generator=generator)[:3] for _ in range(11)])
        return [draw(11, 16), chosen, torch.rand(11, 3, generator=generator).requires_grad_()]
    assert operator == "cross_entropy"
    return [draw(18, 50), torch.randint(0, 50, (18,), generator=generator)]


def there_and_back(
    permute: Any, tokens: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens sorted by experts, and the sums of what experts that take squares would give."""
    rows, order = permute(tokens, chosen, 5)
    assert order.counts.tolist() == chosen.flatten().bincount(minlength=5).tolist()
    return rows, UNPERMUTE[permute](rows.square(), weights, order)


def results(run: Callable[..., Any], arguments: list[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and gradients."""
    flat = [part for value in arguments for part in (value if isinstance(value, list) else [value])]
    if run in UNPERMUTE:
        run = partial(there_and_back, run)
    wanted = [value for value in flat if isinstance(value, torch.Tensor) and value.requires_grad]
    out = run(*arguments)
    outputs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    return [o.detach() for o in outputs], list(torch.autograd.grad(outputs, wanted, weights))


def largest(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(ours, theirs, strict=True)
    )


def uncompiled(name: str) -> AbstractContextManager[Any]:
    """Compute what would be compiled as it is written: compiling takes seconds for each case."""
    return torch.compiler.set_stance("force_eager") if name == "compiled" else nullcontext()


CASES = [
    (operator, implementation.name, dtype)
    for operator, known in OPERATORS.items()
    for implementation in known
    for dtype in TOLERANCE
    # flex has no gradients on a CPU, see `test_mask_rules.py`; hidden is `test_hidden_cross_entropy.py`.
    if implementation.name not in ("reference", "liger", "flex", "hidden")
    and not (implementation.name in ("npu", "grouped_mm") and dtype == torch.float64)
    # Logits are never narrower than fp32.
    and not (operator == "cross_entropy" and dtype == torch.bfloat16)
]


@pytest.mark.parametrize(("operator", "name", "dtype"), CASES, ids=str)
def test_equals_the_plain_one(report: ReportTables, operator: str, name: str, dtype: torch.dtype) -> None:
    npu_operators.install()
    arguments = inputs(operator, dtype)
    with uncompiled(name):
        out, gradients = results(implementations(operator)[name], arguments)
    want, want_gradients = results(implementations(operator)["reference"], arguments)
    found = largest(out, want), largest(gradients, want_gradients)
    report.add(TITLE, HEADER, operator, name, str(dtype).removeprefix("torch."), *found)
    assert max(found) < TOLERANCE[dtype]


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operator", [one for one, known in KERNELS.items() if "compiled" in known])
def test_compiled_ones_equal_the_plain_ones(operator: str, dtype: torch.dtype) -> None:
    arguments = inputs(operator, torch.float32 if operator == "cross_entropy" else dtype)
    ours, theirs = (results(implementations(operator)[name], arguments) for name in ("compiled", "reference"))
    assert max(largest(*pair) for pair in zip(ours, theirs, strict=True)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_computes_the_same_with_what_is_compiled(dtype: torch.dtype) -> None:
    """Its cross entropy widens 16-bit logits itself."""
    compute = ComputeConfig(rotary="compiled", swiglu="compiled", cross_entropy="compiled")
    with uncompiled("compiled"):
        ours = losses_and_gradients(tiny_config(), compute, dtype)
    theirs = losses_and_gradients(tiny_config(), ComputeConfig(), dtype)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plain", JOINED_GATED, ids=lambda plain: plain.__name__)
def test_gate_and_up_side_by_side_give_what_they_give_apart(plain: GatedFunction, dtype: torch.dtype) -> None:
    npu_operators.install()
    apart = inputs("swiglu", dtype)
    joined = torch.cat(apart, dim=-1).detach().requires_grad_()
    with uncompiled("compiled"):
        ours, of_joined = results(JOINED_GATED[plain], [joined])
        theirs, of_apart = results(plain, apart)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(of_joined[0], torch.cat(of_apart, dim=-1))


@pytest.mark.parametrize("has_adapters", [False, True])
def test_an_mlp_reads_gate_and_up_side_by_side_if_no_adapter_adds_to_them(has_adapters: bool) -> None:
    mlp = SwiGLU(tiny_config())
    if has_adapters:
        layer, adapter = mlp.gate_proj, LoraLinear(mlp.gate_proj, LowRank(2, 1.0, 0.0))
        adapter.weight = layer.weight
        mlp.gate_proj = adapter
    x = torch.randn(2, 3, tiny_config().hidden_size, requires_grad=True)
    apart = results(mlp, [x])
    mlp.projections.join()
    mlp.gated_joined = wanted = Mock(side_effect=silu_gated_joined)
    for ours, theirs in zip(results(mlp, [x]), apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert wanted.called != has_adapters


@pytest.mark.parametrize(("queries", "keys"), [(1, 40), (5, 40), (40, 40)])
@pytest.mark.parametrize("kind", ["causal", "window", "alibi", "texts in a row"])
def test_masks_of_npu_attention(queries: int, keys: int, kind: str) -> None:
    npu_operators.install()
    generator = torch.Generator().manual_seed(queries)
    shapes = ((2, 4, queries, 16), (2, 2, keys, 16), (2, 2, keys, 16))
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    slopes = torch.tensor(alibi_slopes(4)) if kind == "alibi" else None
    window = 7 if kind == "window" else None
    mask = attention_mask(queries, keys, window, slopes, torch.float32, torch.device("cpu"))
    if kind == "texts in a row":
        text = torch.arange(keys).div(9, rounding_mode="floor").expand(2, -1)
        same = (text[:, -queries:, None] == text[:, None]).unsqueeze(1)
        mask = same & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    runs = implementations("attention")
    (out, gradients), (want, want_gradients) = (
        results(runs[name], [q, k, v, mask]) for name in ("npu", "reference")
    )
    assert max(largest(out, want), largest(gradients, want_gradients)) < TOLERANCE[torch.float32]


def losses_and_gradients(config: Any, compute: ComputeConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = load_model(InitialWeights(config, seed=3), CPU, dtype)
    apply_kernels(model, compute)
    ids = torch.randint(0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(2, 32))
    sums = forward_backward(
        model,
        NativeEngine(model, OptimizerConfig(), CPU),
        [batch],
        CPU,
        *NextTokenLoss(model, CPU).prepare([batch]),
    )
    return {"loss": sums.loss} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("config", "compute"),
    [
        (tiny_config(), ComputeConfig(rms_norm="torch", cross_entropy="reference", attention="reference")),
        (tiny_config(qk_norm=True), ComputeConfig(rms_norm="torch")),
        (tiny_config(norm="layernorm", mlp="gelu"), ComputeConfig(layer_norm="reference")),
    ],
    ids=["rms_norm, cross_entropy", "normed heads", "layer_norm"],
)
def test_a_model_computes_the_same(config: Any, compute: ComputeConfig) -> None:
    ours = losses_and_gradients(config, compute, torch.float64)
    theirs = losses_and_gradients(config, ComputeConfig(), torch.float64)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-10, atol=1e-13)


def test_a_model_computes_the_same_with_the_operators_of_an_npu() -> None:
    """The functions that `auto` takes on an NPU, in a model on the CPU."""
    npu_operators.install()
    config = tiny_config(qk_norm=True)
    chosen = []
    for taken in (KernelContext(), NPU):
        model = load_model(InitialWeights(config, seed=3), CPU, torch.float32)
        choices = apply_kernels(model, ComputeConfig(), taken)
        ids = torch.randint(0, config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
        batch = MicroBatch(ids[:, :-1], ids[:, 1:], torch.ones(2, 32))
        sums = forward_backward(
            model,
            NativeEngine(model, OptimizerConfig(), CPU),
            [batch],
            CPU,
            *NextTokenLoss(model, CPU).prepare([batch]),
        )
        chosen.append((sums.loss, [p.grad for p in model.parameters()], choices))
    assert {choice.implementation for choice in chosen[1][2]} == {"npu"}
    torch.testing.assert_close(chosen[0][0], chosen[1][0], rtol=1e-6, atol=0)
    for a, b in zip(chosen[0][1], chosen[1][1], strict=True):
        # fp32, norms and attention in another order of operations.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def chosen(kind: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> dict[str, str]:
    setting = KernelContext(Device(kind), dtype, seq_length=64, micro_batch_tokens=128, **more)
    return {operator: choose(operator, "auto", setting)[0].name for operator in OPERATORS}


def test_what_auto_takes() -> None:
    attention = "sdpa" if native_attention.why_not(torch.bfloat16, 128) else "native"
    element = "reference" if native_elementwise.why_not(torch.bfloat16) else "native"
    assert chosen("cpu") == {
        "attention": attention, "scaled_masked_softmax": "reference", "rms_norm": element, "layer_norm": "torch",
        "rotary": element, "swiglu": element, "token_permutation": "reference",
        "grouped_product": "reference", "cross_entropy": "torch",
    }  # fmt: skip
    assert chosen("npu") == dict.fromkeys(OPERATORS, "npu") | {"layer_norm": "torch"}
    assert chosen("npu", torch.float64) == chosen("cpu", torch.float64)
    assert chosen("npu", tp=2)["cross_entropy"] == "torch"
    assert chosen("npu", has_additive_mask=True)["scaled_masked_softmax"] == "reference"
    assert chosen("cuda")["rms_norm"] == "torch"
    assert "compiled" not in chosen("cuda", lengths_vary=True).values()


def test_the_table_says_why() -> None:
    model = load_model(InitialWeights(tiny_config(), seed=3), CPU, torch.float32)
    setting = KernelContext(
        Device("npu"), torch.float32, tp=2, seq_length=64, micro_batch_tokens=128, logits_bytes=1 << 29
    )
    rows = table(
        [*apply_kernels(model, ComputeConfig(triangle_attn=True), setting), update_choice("adam", setting)]
    )
    assert rows == [
        "kernel: attention      triangle  asked for; by blocks, leaving out those that no query sees",
        "kernel: rms_norm       npu       torch_npu's fused operator",
        "kernel: rotary         npu       torch_npu's fused operator npu_rotary_mul",
        "kernel: swiglu         npu       torch_npu's fused operator",
        "kernel: cross_entropy  torch     torch's cross_entropy; not hidden: logits of a micro-batch take 0.50 GiB, "
        "less than 1; not npu: the vocabulary is cut over tp=2 ranks",
        "kernel: adamw          npu       adam: npu_apply_adam_w, tensor by tensor in place",
    ]


@pytest.mark.parametrize(
    ("operator", "name", "setting", "complaint"),
    [
        ("rms_norm", "npu", KernelContext(dtype=torch.float64), "rms_norm=npu cannot run here: it needs an NPU, this "
         "is cpu; choose auto or torch, reference"),
        ("rms_norm", "native", KernelContext(Device("cuda")), "it is C++ for a CPU, this is cuda; choose"),
        ("rotary", "native", KernelContext(dtype=torch.float16), "it takes float32 and bfloat16, not float16"),
        ("swiglu", "liger", KernelContext(), "Liger-Kernel needs a GPU, this is cpu"),
        ("swiglu", "liger", KernelContext(Device("cuda")), "the package liger-kernel is not installed"),
        ("rotary", "npu", KernelContext(Device("npu"), torch.float64), "float32, not float64"),
        ("cross_entropy", "reference", KernelContext(tp=2), "the vocabulary is cut over tp=2 ranks"),
        ("cross_entropy", "npu", KernelContext(Device("npu"), micro_batch_tokens=200_001), "a micro-batch has 200001"),
        ("scaled_masked_softmax", "npu", KernelContext(Device("npu"), seq_length=100), "as seq_length, this is 100"),
        ("scaled_masked_softmax", "npu", KernelContext(Device("npu"), seq_length=64, lengths_vary=True),
         "lengths vary"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_implementation_says_why_it_cannot_run(
    operator: str, name: str, setting: KernelContext, complaint: str
) -> None:
    with pytest.raises(AscendSpeedError) as caught:
        choose(operator, name, setting)
    assert complaint in str(caught.value)


def test_an_operator_that_the_model_lacks() -> None:
    model = load_model(InitialWeights(tiny_config(), seed=3), CPU, torch.float32)
    with pytest.raises(ConfigError, match="layer_norm=torch was asked for, but the model has no LayerNorm"):
        apply_kernels(model, ComputeConfig(layer_norm="torch"))
    with pytest.raises(ConfigError, match="only --attention reference computes a softmax of its own"):
        apply_kernels(model, ComputeConfig(scaled_masked_softmax="reference"))


def test_choices_of_the_options_are_those_of_the_table() -> None:
    assert OPERATORS.keys() == KERNELS.keys() == ComputeConfig().kernel_names().keys()
    for operator, known in OPERATORS.items():
        field = ComputeConfig.model_fields[operator]
        names = [implementation.name for implementation in known]
        assert field.annotation.__args__ == ("auto", *names)  # type: ignore[union-attr]
        assert all(
            f" {name}: {kernel.description};" in str(field.description)
            for name, kernel in KERNELS[operator].items()
        )


def test_help_says_what_auto_takes() -> None:
    said = {
        name: str(ComputeConfig.model_fields[name].description).rpartition("auto: ")[2] for name in KERNELS
    }
    assert said == {
        "attention": "npu on an NPU, sdpa on CUDA, native (if not installed: sdpa) on a CPU.",
        "scaled_masked_softmax": "npu on an NPU, reference elsewhere.",
        "rms_norm": "npu on an NPU, torch on CUDA, native (if not installed: reference) on a CPU.",
        "layer_norm": "torch.",
        "rotary": "npu on an NPU, compiled (if not installed: liger) on CUDA, native "
        "(if not installed: reference) on a CPU.",
        "swiglu": "npu on an NPU, compiled (if not installed: liger) on CUDA, native "
        "(if not installed: reference) on a CPU.",
        "token_permutation": "npu on an NPU, reference elsewhere.",
        "grouped_product": "npu on an NPU, grouped_mm on CUDA, reference on a CPU.",
        "cross_entropy": "hidden where a micro-batch's logits take a GiB, else npu on an NPU, compiled "
        "(if not installed: torch) on CUDA, torch on a CPU.",
    }
    # The rule itself, where nothing stands in the way.
    for kind in ("cpu", "cuda"):
        setting = KernelContext(Device(kind), torch.float32, micro_batch_tokens=128)
        for operator in ("attention", "rms_norm", "layer_norm", "cross_entropy"):
            taken = choose(operator, "auto", setting)[0].name
            # The first of two may not be installed.
            where = rf"{taken}( \(if not installed: \w+\)|\))? on {'CUDA' if kind == 'cuda' else 'a CPU'}"
            assert re.search(where, said[operator]) or taken in said[operator].rpartition(",")[2]


def test_flags_of_2023() -> None:
    assert (
        ComputeConfig(use_flash_attn=True, use_fused_rmsnorm=True).kernel_names()
        == ComputeConfig().kernel_names()
    )
    with pytest.raises(ValueError, match="use_fused_rotary_pos_emb and rotary=reference were both given"):
        ComputeConfig(use_fused_rotary_pos_emb=True, rotary="reference")


def test_setting_of_a_run() -> None:
    model = load_model(InitialWeights(tiny_config(position="alibi"), seed=3), CPU, torch.bfloat16)
    batch = BatchConfig(micro_batch_size=2, optimized_pipeline=True, manual_mbs="1,3")
    setting = kernel_context(model, CPU, 32, batch)
    assert (setting.dtype, setting.has_additive_mask, setting.micro_batch_tokens) == (
        torch.bfloat16,
        True,
        96,
    )


def test_whether_lengths_vary() -> None:
    texts: dict[str, Any] = {"data_path": ("x",), "seq_length": 32}
    assert not DataConfig(**texts).lengths_vary
    assert not FinetuneDataConfig(**texts).lengths_vary
    assert FinetuneDataConfig(**texts, is_instruction_dataset=True).lengths_vary
    assert not FinetuneDataConfig(
        **texts, is_instruction_dataset=True, variable_seq_lengths=False
    ).lengths_vary


def test_every_function_of_the_device_modules_is_offered() -> None:
    offered = {
        implementation.run for implementations in OPERATORS.values() for implementation in implementations
    } | {*int8.IMPLEMENTATIONS.values(), *JOINED_GATED.values(), *UNPERMUTE.values()}
    for module in (npu, liger):
        for name, value in vars(module).items():
            if name.startswith(("npu_", "liger_")):
                assert value in offered, name
