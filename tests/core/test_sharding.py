"""The sharding table: which part of each tensor a rank holds, for every family and layout; which rows there can be."""

from collections import Counter
from itertools import product

import pytest

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.sharding import (
    SHARDING,
    ModuleSharding,
    Partition,
    Slice,
    assign_writers,
    chunk_range,
    is_output_projection,
    module_sharding,
    sharded_dim,
    tensor_sharding,
    tensor_slice,
)
from ascendspeed_core.models.families import find_family
from ascendspeed_core.weights.load import parameter_shapes
from ascendspeed_data.errors import ConfigError
from core.expert_cases import experts_config
from support.families import REFERENCES
from support.models import tiny_config

CONFIG = tiny_config(vocab_size=61, num_attention_heads=8, num_key_value_heads=2, qk_norm=True)
LAYOUTS = [Layout(), Layout(tp=2), Layout(tp=4), Layout(tp=8, sequence_parallel=True)]


def parts(name: str, shape: tuple[int, ...], layout: Layout) -> list[Slice]:
    return [tensor_slice(name, shape, CONFIG, layout, rank) for rank in range(layout.tp)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("reference", REFERENCES)
def test_parts_of_all_ranks_make_up_each_tensor_of_a_family(reference: str, layout: Layout) -> None:
    """Every element is held by as many ranks as each of its holders says, which number themselves from 0."""
    names = {rule.ours.format(layer=0) for rule in find_family(REFERENCES[reference].family).rules}
    for name in names:
        shape = (16, 16) if name.endswith("weight") and "norm" not in name else (16,)
        holders = Counter[tuple[int, ...]]()
        numbers: dict[tuple[int, ...], list[int]] = {}
        held = parts(name, shape, layout)
        for part in held:
            for element in product(*(range(cut.start, cut.stop) for cut in part.index)):
                holders[element] += 1
                numbers.setdefault(element, []).append(part.tp_replica)
        for element in product(*map(range, shape)):
            assert holders[element] == held[0].tp_replicas, name
            assert numbers[element] == list(range(held[0].tp_replicas)), name
        cut = {dim for part in held for dim in range(len(shape)) if part.sizes[dim] != shape[dim]}
        dim = sharded_dim(name)
        assert cut == (set() if dim is None or layout.tp == 1 else {dim}), name


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("embedding.weight", 0),
        ("layers.1.attention_norm.weight", None),
        ("layers.1.attention.q_proj.weight", 0),
        ("layers.1.attention.k_proj.bias", 0),
        ("layers.1.attention.o_proj.weight", 1),
        ("layers.1.attention.o_proj.bias", None),
        ("layers.1.attention.q_norm.weight", None),
        ("layers.12.mlp.up_proj.weight", 0),
        ("layers.12.mlp.down_proj.weight", 1),
        ("layers.1.attention.q_proj.lora_A.weight", None),
        ("layers.1.attention.q_proj.lora_B.weight", 0),
        ("layers.1.mlp.down_proj.lora_A.weight", 1),
        ("layers.1.mlp.down_proj.lora_B.weight", None),
        ("final_norm.weight", None),
        ("output_head.weight", 0),
    ],
)
def test_dimension_that_is_cut(name: str, dim: int | None) -> None:
    assert sharded_dim(name) == dim


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_that_are_partial(sequence_parallel: bool) -> None:
    """Where a rank sees its own heads only, or a part of the sequence only, gradients are summed over tp."""
    layout = Layout(tp=4, sequence_parallel=sequence_parallel)
    inside = {
        "layers.0.attention.q_norm.weight": (8,),
        "layers.0.attention.k_proj.weight": (16, 64),
        "layers.0.attention.q_proj.lora_A.weight": (4, 64),
        "layers.0.mlp.down_proj.lora_B.weight": (64, 4),
    }
    between = {"layers.0.mlp_norm.weight": (64,), "layers.0.attention.o_proj.bias": (64,)}
    cut = {"layers.0.attention.q_proj.weight": (64, 64), "embedding.weight": (61, 64)}
    for names, wanted in ((inside, True), (between, sequence_parallel), (cut, False)):
        for name, shape in names.items():
            assert {part.has_partial_gradient for part in parts(name, shape, layout)} == {wanted}, name
    assert not any(tensor_slice(n, s, CONFIG, Layout(), 0).has_partial_gradient for n, s in inside.items())


def test_every_parameter_has_a_row_and_every_row_a_parameter() -> None:
    """All options of the decoder together have all modules of the table."""
    configs = [
        tiny_config(qk_norm=True),
        experts_config(),
        tiny_config(
            norm="layernorm", mlp="gelu", position="alibi", qkv_bias=True, output_bias=True, mlp_bias=True,
            embedding_norm=True,
        ),
        tiny_config(qk_norm=True, qk_norm_kind="by_head", attention_sinks=True, norm_placement="both"),
        tiny_config(
            num_key_value_heads=8, kv_latent_dim=8, q_latent_dim=8, value_head_dim=4, rotary_dim=2
        ),
    ]  # fmt: skip
    used = {id(tensor_sharding(name)) for config in configs for name in parameter_shapes(config)}
    # Frequencies are no parameter, but some formats store them.
    unused = [module for module, row in SHARDING.items() if id(row) not in used]
    assert unused == ["rotary"]


def test_a_module_without_a_row_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match=r"layers\.3\.mlp\.mixer\.weight has no row in the sharding table; add"
    ):
        tensor_slice("layers.3.mlp.mixer.weight", (4, 64), CONFIG, Layout(tp=2), 0)
    assert module_sharding("layers.3.mlp") is None


def test_a_new_kind_of_layer_is_one_row() -> None:
    table = SHARDING | {
        "mlp.router": ModuleSharding(Partition.REPLICATED),
        "mlp.experts.{expert}.up_proj": ModuleSharding(Partition.COLUMN_PARALLEL, ("edp", "cp")),
        "mlp.experts.{expert}.down_proj": ModuleSharding(Partition.ROW_PARALLEL, ("edp", "cp")),
    }
    layout = Layout(tp=2)
    up = tensor_slice("layers.3.mlp.experts.11.up_proj.weight", (8, 4), CONFIG, layout, 1, table)
    down = tensor_slice("layers.3.mlp.experts.2.down_proj.weight", (4, 8), CONFIG, layout, 1, table)
    router = tensor_slice("layers.3.mlp.router.weight", (16, 4), CONFIG, layout, 1, table)
    assert (up.index, up.replica_axes) == ((slice(4, 8), slice(0, 4)), ("edp", "cp"))
    assert (down.index, down.replica_axes) == ((slice(0, 4), slice(4, 8)), ("edp", "cp"))
    assert (router.sizes, router.tp_replicas, router.has_partial_gradient) == ((16, 4), 2, False)


def test_output_projections_are_the_row_parallel_weights() -> None:
    found = {
        name
        for name in parameter_shapes(tiny_config(num_layers=1, output_bias=True))
        if is_output_projection(name)
    }
    assert found == {"layers.0.attention.o_proj.weight", "layers.0.mlp.down_proj.weight"}


@pytest.mark.parametrize(("length", "count"), [(10, 4), (8, 4), (3, 4), (61, 8)])
def test_chunks_are_torchs(length: int, count: int) -> None:
    import torch

    ours = [chunk_range(length, count, number) for number in range(count)]
    wanted = [len(chunk) for chunk in torch.arange(length).chunk(count)]
    assert [part.stop - part.start for part in ours] == wanted + [0] * (count - len(wanted))


def test_writers_share_the_work_among_tensors_with_the_same_holders() -> None:
    """What tensors of other holders weigh does not count, since not all holders of one know the other."""
    dense, expert = (Slice((8,), (slice(0, 8),), replica_axes=axes) for axes in (("dp", "cp"), ("edp", "cp")))
    without = assign_writers([("a", dense, 2), ("b", dense, 2)])
    with_experts = assign_writers([("a", dense, 2), ("e", expert, 2), ("b", dense, 2), ("f", expert, 2)])
    assert without == {"a": 0, "b": 1}
    assert with_experts == {"a": 0, "e": 0, "b": 1, "f": 1}
