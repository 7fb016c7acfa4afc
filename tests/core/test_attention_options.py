"""Options of attention, norms and multipliers: against other programs' functions, and under every kind of layout."""

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ascendspeed_core.build import apply_kernels, load_model
from ascendspeed_core.config.compute import ComputeConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.training import RecomputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.reference import reference_attention
from ascendspeed_core.kernels.registry import implementations
from ascendspeed_core.models.position import RotaryKind, magnitude_of, rotary_frequencies
from ascendspeed_core.observability.mfu import training_flops_per_token
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_data.errors import AscendSpeedError
from core.attention_options import OPTIONS
from core.test_layout_equality import TOLERANCE, differences
from core.training_cases import Trained, join_stages, train
from support import npu_operators
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "Options of attention, four steps against one process: largest relative difference"
STEPS = 4
HEADER = ("options", "layout", "losses", "grad norm", "first gradients", "weights after")
CASES: list[Any] = [
    ("windows, caps and sinks", Layout(tp=2, sequence_parallel=True), {}),
    ("windows, caps and sinks", Layout(cp=2), {}),
    ("windows, caps and sinks", Layout(pp=2, dp=2, sharded_optimizer=True), {}),
    ("norms over all heads", Layout(tp=2, sequence_parallel=True), {"joined": True}),
    ("norms over all heads", Layout(tp=2, cp=2), {"documents": True}),
    ("norms over all heads", Layout(tp=2, pp=2, schedule="interleaved", layers_per_stage=1), {}),
    ("blocks side by side", Layout(tp=2, sequence_parallel=True), {"recompute": "selective"}),
    ("blocks side by side", Layout(dp=2, sharded_optimizer=True), {"joined": True}),
    ("latents", Layout(tp=2, sequence_parallel=True), {"joined": True}),
    ("latents", Layout(cp=2), {}),
]
CASES += [
    pytest.param(name, layout, {}, marks=pytest.mark.nightly)
    for name in OPTIONS
    for layout in (
        Layout(tp=8, sequence_parallel=True),
        Layout(cp=4),
        Layout(tp=2, cp=2, pp=2),
        Layout(tp=2, pp=2, dp=2, sequence_parallel=True, sharded_optimizer=True),
        *(
            Layout(pp=2, schedule=schedule, layers_per_stage=layers)
            for schedule, layers in (("gpipe", None), ("looped-bfs", 1), ("zbv", None), ("dualpipev", None))
        ),
    )
]


def options_of(asked: dict[str, Any]) -> dict[str, Any]:
    if "recompute" not in asked:
        return asked
    return {"recompute": RecomputeConfig(checkpoint_activations=True, checkpoint_policy=asked["recompute"])}


@cache
def one_process(name: str, documents: bool) -> Trained:
    torch.set_num_threads(1)
    return train(tiny_config(**OPTIONS[name]), Layout(), "float64", STEPS, documents=documents)


@pytest.mark.parametrize(("name", "layout", "asked"), CASES, ids=str)
def test_training_equals_one_process(
    workers: WorkerPool, report: ReportTables, name: str, layout: Layout, asked: dict[str, Any]
) -> None:
    options = options_of(asked)
    config = tiny_config(**OPTIONS[name])
    assert layout.world_size > 1
    ranks = workers.run(train_with, layout.world_size, config, layout, options)
    want = one_process(name, options.get("documents", False))
    found = differences(join_stages(ranks, layout), want)
    report.add(TITLE, HEADER, name, str(layout), *found)
    assert all(value <= limit for value, limit in zip(found, TOLERANCE["float64"], strict=True)), found
    assert all(float(gradient.abs().max()) > 1e-9 for gradient in want.gradients.values())


def train_with(config: Any, layout: Layout, options: dict[str, Any]) -> Trained:
    return train(config, layout, "float64", STEPS, **options)


@pytest.mark.parametrize("queries", [1, 6, 9])
def test_sinks_and_caps_are_those_of_transformers(queries: int) -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss

    generator = torch.Generator().manual_seed(queries)
    q, k, v = (
        torch.randn(2, heads, length, 8, generator=generator)
        for heads, length in ((6, queries), (3, 9), (3, 9))
    )
    sinks = torch.randn(6, generator=generator)
    hidden = torch.ones(queries, 9, dtype=torch.bool).triu(9 - queries + 1)
    mask = torch.zeros(queries, 9).masked_fill(hidden, torch.finfo(torch.float32).min)
    module: Any = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False, head_dim=8)
    with_sinks, _ = gpt_oss(module, q, k, v, mask[None, None], scaling=0.4)
    capped, _ = gemma(module, q, k, v, mask[None, None], scaling=0.4, softcap=0.9)
    # fp32 on values of about 1.
    close: dict[str, float] = {"rtol": 0, "atol": 1e-6}
    got = reference_attention(q, k, v, None, scale=0.4, sinks=sinks)
    torch.testing.assert_close(got.transpose(1, 2), with_sinks, **close)
    got = reference_attention(q, k, v, None, scale=0.4, softcap=0.9)
    torch.testing.assert_close(got.transpose(1, 2), capped, **close)
    # Both together: a sink is not capped.
    scores = 0.9 * ((q @ k.repeat_interleave(2, 1).mT * 0.4) / 0.9).tanh() + mask
    weights = torch.cat([scores, sinks[None, :, None, None].expand(2, 6, queries, 1)], -1).softmax(-1)
    got = reference_attention(q, k, v, ~hidden, scale=0.4, softcap=0.9, sinks=sinks)
    torch.testing.assert_close(got, weights[..., :-1] @ v.repeat_interleave(2, 1), **close)


@pytest.mark.parametrize("name", ["sdpa", "triangle", "npu"])
@pytest.mark.parametrize("queries", [1, 300])
def test_kernels_scale_scores(name: str, queries: int) -> None:
    npu_operators.install()
    generator, results = torch.Generator().manual_seed(1), []
    shapes = ((2, 4, queries, 16), (2, 2, 300, 16), (2, 2, 300, 16))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    of_result = torch.randn(shapes[0], generator=generator)
    for run in (implementations("attention")[kernel] for kernel in (name, "reference")):
        out = run(*inputs, None, scale=0.7)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, of_result)])
    # fp32, scores of up to 12.
    assert max(float((a - b).abs().max()) for a, b in zip(*results, strict=True)) < 1e-4


def test_attention_by_blocks_is_taken_where_scores_are_changed() -> None:
    mesh = ParallelMesh.create(Device("cpu"), Layout())
    model = load_model(InitialWeights(tiny_config(attention_sinks=True), 0), mesh, torch.float32)
    chosen = {choice.operator: choice for choice in apply_kernels(model, ComputeConfig())}
    assert chosen["attention"].implementation == "triangle"
    assert "not sdpa: the model has sinks, which only triangle, flex and" in chosen["attention"].reason
    with pytest.raises(AscendSpeedError, match="attention=sdpa cannot run here: the model has sinks"):
        apply_kernels(model, ComputeConfig(attention="sdpa"))


@pytest.mark.parametrize("mscale", [None, (1.0, 1.0), (0.707, 0.5)])
@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_is_that_of_transformers(mscale: tuple[float, float] | None, truncate: bool) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    own = {} if mscale is None else dict(zip(("mscale", "mscale_all_dim"), mscale, strict=True))
    stated = {"factor": 40.0, "original_max_position_embeddings": 64, "truncate": truncate, **own}
    theirs = LlamaConfig(
        hidden_size=64, num_attention_heads=1, max_position_embeddings=2560,
        rope_theta=1e4, rope_scaling={"rope_type": "yarn", **stated},
    )  # fmt: skip
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    scaling = tiny_config(rotary_scaling={"kind": "yarn", **stated}).rotary_scaling
    torch.testing.assert_close(rotary_frequencies(RotaryKind(64, 1e4, scaling)), frequencies)
    assert magnitude_of(scaling) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_are_counted_and_begin_where_they_should(name: str) -> None:
    config = tiny_config(**OPTIONS[name])
    assert config.num_parameters == sum(math.prod(shape) for shape in parameter_shapes(config).values())
    weights = InitialWeights(config, 0)
    norms = [n for n in weights.tensors() if n.endswith("norm.weight")]
    begin = 0.0 if config.norm_unit_offset else 1.0
    assert all(bool((weights.read(n) == begin).all()) for n in norms)
    sinks = [n for n in weights.tensors() if "sinks" in n]
    assert len(sinks) == (4 if config.attention_sinks else 0)
    assert not any(weights.read(n).any() for n in sinks)


def test_windows_of_some_layers_count_in_flops() -> None:
    full, windowed = tiny_config(), tiny_config(sliding_window=8)
    half = tiny_config(sliding_window=8, window_layers=(0, 2))
    got = [training_flops_per_token(config, 64) for config in (full, half, windowed)]
    assert got[0] > got[1] > got[2]
    assert got[1] == (got[0] + got[2]) / 2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sliding_window": 4, "window_layers": (4,)}, "window_layers must name layers of 0 to 3, each once"),
        ({"window_layers": (1,)}, "window_layers was given without sliding_window"),
        ({"window_rotary_base": 10.0}, "window_rotary_base was given without sliding_window"),
        ({"rotary_layers": (1, 1)}, "rotary_layers must name layers of 0 to 3, each once, in order"),
        ({"rotary_dim": 6}, "rotary_dim=6 is no even part of head_dim=4"),
        ({"position": "alibi", "rotary_dim": 2}, "rotary_dim was given without position=rotary"),
        ({"parallel_blocks": True, "norm_placement": "both"}, "parallel_blocks=true reads one norm"),
        ({"value_head_dim": 4}, "q_latent_dim or value_head_dim was given without kv_latent_dim"),
        ({"kv_latent_dim": 8}, "kv_latent_dim=8 needs value_head_dim and a rotary_dim below head_dim=4"),
        (
            OPTIONS["latents"] | {"attention_sinks": True, "attention_softcap": 1.0, "attention_scale": 1.0},
            "kv_latent_dim=12 with attention_scale, attention_softcap, attention_sinks is not supported",
        ),
        (
            {"rotary_scaling": {"kind": "linear", "factor": 2.0, "mscale": 1.0}},
            "mscale=1.0 and mscale_all_dim=None count only together",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        tiny_config(**changes)
