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
from ascendspeed_core.build import load_model, parameter_slices
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.sharding import tensor_sharding
from ascendspeed_core.device import Device
from ascendspeed_core.models.families import find_family
from ascendspeed_core.models.families.registry import FAMILIES
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import AscendSpeedError
from core.training_cases import whole
from support.families import EXPERT_REFERENCES, logits_of
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "Models with experts against transformers: largest absolute difference, fp32"
HEADER = ("model", "layout", "logits", "gradients")
LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, ep=2, etp=1), Layout(tp=2, dp=2, ep=2)]
# fp32 rounds at 6e-8; logits of about 1, sums of up to 48 terms in three layers.
TOLERANCE = 1e-5
TOKENS = torch.randint(0, 125, (2, 17), generator=torch.Generator().manual_seed(3))


def logits(folder: str, layout: Layout) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of a model under a layout, and without a pipeline the gradients of a loss."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float32)
    batch, vocabulary = ModelInput(TOKENS), model.config.vocab_size
    found = gather_logits(forward_through_stages(model, mesh, batch), vocabulary, mesh.group("tp"))
    if layout.pp > 1:
        return found, {}
    from ascendspeed_core.parallel.cross_entropy import cross_entropy

    losses = cross_entropy(model(batch).logits[:, :-1], TOKENS[:, 1:], vocabulary, mesh.group("tp"))
    # Every replica computes the same tokens, and experts hear of all of them.
    (losses.mean() / layout.dp).backward()
    gradients = {}
    for name, part in parameter_slices(model, mesh).items():
        group = mesh.group(tensor_sharding(name).axis)
        gradient = whole(model.get_parameter(name).grad, part, group, part.has_partial_gradient)  # type: ignore[arg-type]
        gradients[name] = mesh.sum_over(part.replica_axes, gradient)
    return found, gradients


def their_gradients(reference: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients of transformers' model by our names."""
    config = open_weights(folder).config
    fused = find_family(config.family)
    rules = fused.other_rules[0]
    found = {}
    for mapping in (m for rule in rules for m in rule.expand(config, fused.index_ranges(config))):
        gradient = reference.get_parameter(mapping.theirs).grad
        assert gradient is not None
        for position in mapping.their_position:
            gradient = gradient[position]
        found[mapping.ours] = gradient if mapping.packed is None else gradient.chunk(2)[mapping.packed.part]
    return found


@pytest.mark.parametrize("name", EXPERT_REFERENCES)
def test_computes_what_transformers_computes(
    workers: WorkerPool, report: ReportTables, tmp_path: Path, name: str
) -> None:
    reference = EXPERT_REFERENCES[name].save(tmp_path)
    want = logits_of(reference, TOKENS)
    F.cross_entropy(want[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    gradients = their_gradients(reference, tmp_path)
    assert float(want.detach().abs().max()) > 0.5
    for layout in LAYOUTS:
        seen: dict[str, torch.Tensor] = {}
        differences = []
        for found, ours in workers.run(logits, layout.world_size, str(tmp_path), layout):
            differences.append(float((found - want.detach()).abs().max()))
            seen |= ours
        assert not seen or seen.keys() == gradients.keys()
        largest = max((float((seen[n] - gradients[n]).abs().max()) for n in seen), default=0.0)
        report.add(TITLE, HEADER, name, str(layout), max(differences), largest)
        assert max(*differences, largest) < TOLERANCE


@pytest.mark.parametrize("name", EXPERT_REFERENCES)
def test_files_come_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    folder, back, fused = (tmp_path / part for part in ("hf", "back", "fused"))
    reference = EXPERT_REFERENCES[name].save(folder)
    back.mkdir()
    fused.mkdir()
    source = open_weights(folder)
    write_hugging_face(source, back, None, 1 << 30)
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
    }  # fmt: skip
    for family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        for name, hf in FAMILIES[family].sizes.items():
            config = FAMILIES[family].read_config(hf)
            assert config.num_parameters / 1e9 == pytest.approx(stated[name][0], abs=0.06)
            # What the publishers count as active differs by the embedding.
            assert config.num_active_parameters / 1e9 == pytest.approx(stated[name][1], abs=0.4)


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
