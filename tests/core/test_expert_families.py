"""Families with experts: configs, logits and gradients as in transformers, files in every layout of their tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ascendspeed_ckpt.writers.huggingface import write_hugging_face
from ascendspeed_ckpt.writers.native import write_native
from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.models.families import find_family
from ascendspeed_core.models.families.packing import Alternating
from ascendspeed_core.models.families.registry import FAMILIES
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import AscendSpeedError
from core.training_cases import first_gradients
from support.families import EXPERT_REFERENCES, logits_of
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "Models with experts against transformers: largest absolute difference, fp32"
HEADER = ("model", "layout", "logits", "gradients")
QUICK = [Layout(), Layout(tp=2)]
FURTHER = [Layout(pp=2), Layout(dp=2, ep=2), Layout(tp=2, ep=2, etp=1), Layout(tp=2, dp=2, ep=2)]
CASES: list[Any] = [(name, layout) for name in EXPERT_REFERENCES for layout in QUICK]
CASES += [("DeepSeek-V3", Layout(pp=2)), ("DeepSeek-V3", Layout(tp=2, ep=2, etp=1))]
CASES += [
    pytest.param(name, layout, marks=pytest.mark.nightly)
    for name in EXPERT_REFERENCES
    for layout in FURTHER
    if (name, layout) not in CASES
]
# fp32 rounds at 6e-8; logits of about 1, sums of up to 48 terms in three layers.
TOLERANCE = 1e-5
TOKENS = torch.randint(0, 125, (2, 17), generator=torch.Generator().manual_seed(3))


def logits(folder: str, layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a model under a layout, and the gradients of this stage."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float32)
    # Every replica computes the same tokens, and experts hear of all of them.
    batch = MicroBatch(TOKENS[:, :-1], TOKENS[:, 1:], torch.ones(TOKENS[:, 1:].shape))
    gradients = first_gradients(model, [batch], mesh)
    found = forward_through_stages(model, mesh, ModelInput(TOKENS))
    return gather_logits(found, model.config.vocab_size, mesh.group("tp")), gradients


def their_gradients(reference: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of transformers' model by our names; what it holds as a buffer has none."""
    config = open_weights(folder).config
    family = find_family(config.family)
    rules = (*family.other_rules, family.rules)[0]
    parameters, found = dict(reference.named_parameters()), {}
    for mapping in (m for rule in rules for m in rule.expand(config, family.index_ranges(config))):
        if mapping.theirs not in parameters:
            assert mapping.ours.endswith(".router.bias")
            continue
        gradient = parameters[mapping.theirs].grad
        assert gradient is not None
        for position in mapping.their_position:
            gradient = gradient[position]
        gradient = gradient.T if mapping.transposed and gradient.dim() == 2 else gradient
        if isinstance(mapping.packed, Alternating):
            gradient = gradient[mapping.packed.part :: 2]
        elif mapping.packed is not None:
            gradient = gradient.chunk(2)[mapping.packed.part]
        found[mapping.ours] = gradient
    return found


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_computes_what_transformers_computes(
    workers: WorkerPool, report: ReportTables, tmp_path: Path, name: str, layout: Layout
) -> None:
    reference = EXPERT_REFERENCES[name].save(tmp_path)
    want = logits_of(reference, TOKENS)
    F.cross_entropy(want[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    gradients = their_gradients(reference, tmp_path)
    assert float(want.detach().abs().max()) > 0.5
    seen: dict[str, torch.Tensor] = {}
    differences = []
    for found, ours in workers.run(logits, layout.world_size, str(tmp_path), layout):
        differences.append(float((found - want.detach()).abs().max()))
        seen |= ours
    assert seen.keys() == gradients.keys()
    largest = max(float((seen[name] - gradients[name]).abs().max()) for name in seen)
    report.add(TITLE, HEADER, name, str(layout), max(differences), largest)
    assert max(*differences, largest) < TOLERANCE


@pytest.mark.parametrize("name", EXPERT_REFERENCES)
def test_files_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    folder, native, back, fused = (tmp_path / part for part in ("hf", "native", "back", "fused"))
    reference = EXPERT_REFERENCES[name].save(folder)
    back.mkdir()
    fused.mkdir()
    source = open_weights(folder)
    native.mkdir()
    write_native(source, native, None)
    assert open_weights(native).config == source.config
    write_hugging_face(open_weights(native), back, None, 1 << 30)
    stored, written = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[key], stored[key]) for key in stored)
    assert open_weights(back).config == source.config
    # As transformers 5 holds them: all experts of a layer in one tensor.
    save_file(
        {key: value.contiguous() for key, value in reference.state_dict().items()},
        fused / "model.safetensors",
    )
    (fused / "config.json").write_text((folder / "config.json").read_text())
    held = open_weights(fused)
    assert held.config == source.config
    assert all(torch.equal(held.read(key), source.read(key)) for key in source.tensors())


def test_published_sizes() -> None:
    """Numbers of parameters that the publishers state, in billions: all, and those that a token uses."""
    stated = {
        "mixtral-8x7b": (46.7, 12.9), "mixtral-8x22b": (140.6, 39.1), "qwen1.5-moe-a2.7b": (14.3, 2.7),
        "qwen2-57b-a14b": (57.4, 14.2), "qwen3-30b-a3b": (30.5, 3.3), "qwen3-235b-a22b": (235.1, 22.2),
        "deepseek-v2-lite": (15.7, 2.4), "deepseek-v3": (671, 37), "kimi-k2": (1000, 32), "glm-4.5": (355, 32),
        "glm-4.5-air": (106, 12), "gpt-oss-20b": (20.9, 3.6), "gpt-oss-120b": (116.8, 5.1),
    }  # fmt: skip
    for family in dict.fromkeys(reference.family for reference in EXPERT_REFERENCES.values()):
        for name, hf in FAMILIES[family].sizes.items():
            config = FAMILIES[family].read_config(hf)
            total, active = stated.pop(name)
            # Whole numbers are rounded, up to that of Kimi's trillion.
            assert config.num_parameters / 1e9 == pytest.approx(
                total, abs=0.06 if total % 1 else 0.03 * total
            )
            # What the publishers count as active differs by the embedding, and the head.
            both = 2 * config.vocab_size * config.hidden_size / 1e9
            assert -0.4 < config.num_active_parameters / 1e9 - active < both + 0.4
            assert FAMILIES[family].read_config(FAMILIES[family].write_config(config)) == config
    assert not stated


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    EXPERT_REFERENCES["DeepSeek-V3"].save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    inner = {name: t.clone() for name, t in tensors.items() if name.startswith("model.layers.2.")}
    further = {name.replace(".2.", ".3.", 1): tensor for name, tensor in inner.items()}
    save_file(tensors | further, tmp_path / "model.safetensors", {"format": "pt"})
    left = open_weights(tmp_path).left_out()
    assert "of a layer that predicts a further token (num_nextn_predict_layers=1)" in str(left)
    hf = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(AscendSpeedError, match="num_hidden_layers=3, but there are weights of layer 3"):
        open_weights(tmp_path)


def test_how_deepseek_says_experts() -> None:
    v2, v3 = FAMILIES["deepseek_v2"], FAMILIES["deepseek_v3"]
    greedy = v2.read_config(v2.sizes["deepseek-v2-lite"] | {"n_group": 8, "topk_group": 3}).experts
    assert greedy is not None
    assert (greedy.groups, greedy.normalised, greedy.shared_ffn_hidden_size) == (1, False, 2816)
    limited = v3.read_config(v3.sizes["deepseek-v3"]).experts
    assert limited is not None
    assert (limited.groups, limited.groups_per_token, limited.dense_layers) == (8, 4, (0, 1, 2))
    for family, name, changes, message in (
        (v2, "deepseek-v2-lite", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not supported here"),
        (v2, "deepseek-v2-lite", {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
        (v3, "deepseek-v3", {"scoring_func": "softmax"}, "scoring_func='softmax' is not supported here"),
        (v3, "deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported; only 1 is"),
        (v3, "deepseek-v3", {"n_group": 7}, "groups=7 does not divide count=256"),
        (v3, "deepseek-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace=-1 is not a whole number"),
    ):
        with pytest.raises(AscendSpeedError, match=message):
            family.read_config(family.sizes[name] | changes)
    gpt = FAMILIES["gpt_oss"]
    with pytest.raises(AscendSpeedError, match="rope_scaling is missing, and has no default"):
        gpt.read_config({k: v for k, v in gpt.sizes["gpt-oss-20b"].items() if k != "rope_scaling"})


BASE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 5}, "per_token=5 is more than the 4 experts that a token may use"),
        ({"num_experts": None}, "num_experts=None is not a number"),
        ({"num_local_experts": 8}, "num_experts=4 and num_local_experts=8 contradict each other; leave one"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported for models with experts"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"mlp_only_layers": 3}, "mlp_only_layers=3 is not a list of layers"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 is not a number of 1"),
    ],
)
def test_what_a_config_cannot_say(changes: dict[str, Any], message: str) -> None:
    hf = json.loads(json.dumps(BASE | changes))
    with pytest.raises(AscendSpeedError, match=message):
        FAMILIES["qwen2_moe"].read_config(hf)


def test_layers_without_experts() -> None:
    read = FAMILIES["qwen2_moe"].read_config
    layers = [
        read(BASE | {"num_hidden_layers": 6} | changes).experts.dense_layers  # type: ignore[union-attr]
        for changes in ({}, {"mlp_only_layers": [4]}, {"decoder_sparse_step": 3, "mlp_only_layers": [2]})
    ]
    assert layers == [(), (4,), (0, 1, 2, 3, 4)]
