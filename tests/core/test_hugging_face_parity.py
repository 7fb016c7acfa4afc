"""Our model computes what transformers computes, under every layout: logits and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from ascendspeed_core.build import load_model, parameter_slices
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.families import find_family
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.cross_entropy import cross_entropy
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import open_weights
from core.training_cases import whole
from support.families import rotary_of
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "Against transformers: largest absolute difference"
HEADER = ("model", "layout", "dtype", "logits", "gradients")
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "tied head, odd vocabulary": {"tie_word_embeddings": True, "vocab_size": 125},
    "as many key-value heads as heads": {"num_key_value_heads": 8},
    "head size of its own": {"head_dim": 6, "rotary_base": 500000.0},
}
# Only the order of sums differs; fp32 rounds at 6e-8, bf16 at 4e-3, on logits of about 1. In float64 there is nothing
# to compare with: transformers normalises in fp32 even then.
TOLERANCE = {"float32": 5e-6, "bfloat16": 5e-2}


def tokens_of(config: ModelConfig) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(11))


def ours(folder: str, layout: Layout, dtype_name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, getattr(torch, dtype_name))
    tokens = tokens_of(model.config)
    logits = model(ModelInput(tokens)).logits
    losses = cross_entropy(logits[:, :-1], tokens[:, 1:], model.config.vocab_size, mesh.group("tp"))
    losses.mean().backward()
    gathered = gather_logits(logits.detach(), model.config.vocab_size, mesh.group("tp"))
    gradients = {}
    for name, place in parameter_slices(model, mesh).items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradients[name] = whole(gradient, place, mesh.group("tp"), place.has_partial_gradient)
    return gathered, gradients


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype_name", TOLERANCE)
def test_logits_and_gradients(
    workers: WorkerPool, report: ReportTables, tmp_path: Path, shape: str, tp: int, dtype_name: str
) -> None:
    config = tiny_config(**SHAPES[shape])
    save_hugging_face(config, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype_name))
    tokens = tokens_of(config)
    output = reference(tokens, labels=tokens)
    output.loss.backward()
    theirs = dict(reference.named_parameters())
    for logits, gradients in workers.run(ours, tp, str(tmp_path), Layout(tp=tp), dtype_name):
        rules = list(find_family("llama").weights(config))
        assert sorted(gradients) == sorted(rule.ours for rule in rules)
        logit_difference = float((logits - output.logits.detach()).abs().max())
        gradient_difference = max(
            float((gradients[rule.ours] - theirs[rule.theirs].grad).abs().max()) for rule in rules
        )
        assert max(logit_difference, gradient_difference) < TOLERANCE[dtype_name]
    report.add(TITLE, HEADER, shape, f"tp{tp}", dtype_name, logit_difference, gradient_difference)
    assert float(output.logits.detach().abs().max()) > 0.3


def test_configs_survive_the_round_trip(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for changes in SHAPES.values():
        config = tiny_config(**changes)
        save_hugging_face(config, tmp_path)
        assert open_weights(tmp_path).config == config
        theirs = AutoConfig.from_pretrained(tmp_path)
        assert theirs.num_key_value_heads == config.num_key_value_heads
        assert rotary_of(theirs)["rope_theta"] == config.rotary_base
