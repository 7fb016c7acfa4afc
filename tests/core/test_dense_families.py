"""The dense families of today compute what their references compute: logits, gradients, and the files come back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ascendspeed_ckpt.writers.huggingface import write_hugging_face
from ascendspeed_ckpt.writers.native import write_native
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.models.families import find_family
from ascendspeed_core.weights import open_weights
from core.family_cases import TOLERANCE, largest_differences, ours, tokens_of
from support.dense_families import DENSE_REFERENCES
from support.families import logits_of
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "Dense families against their references, fp32: largest absolute difference"
HEADER = ("model", "layout", "logits", "gradients")
FURTHER = [Layout(), Layout(tp=2, pp=2, sequence_parallel=True)]
CASES: list[Any] = [(name, layout) for name in DENSE_REFERENCES for layout in (Layout(tp=2), Layout(pp=2))]
CASES += [pytest.param(n, layout, marks=pytest.mark.nightly) for n in DENSE_REFERENCES for layout in FURTHER]
CASES += [
    pytest.param(n, Layout(tp=8), marks=pytest.mark.nightly) for n in ("OLMo 3", "Command R+", "Gemma 3")
]
# Twice as many ranks as key-value heads: their norms stand on two ranks each.
CASES.append(("OLMo 2", Layout(tp=8)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and model of every reference."""
    made = {}
    for name, reference in DENSE_REFERENCES.items():
        folder = tmp_path_factory.mktemp("reference")
        made[name] = (folder, reference.save(folder))
    return made


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_logits_and_gradients(
    workers: WorkerPool,
    report: ReportTables,
    folders: dict[str, tuple[Path, Any]],
    name: str,
    layout: Layout,
) -> None:
    (folder, model), reference = folders[name], DENSE_REFERENCES[name]
    config = open_weights(folder).config
    assert config.family == reference.family
    ranks = workers.run(ours, layout.world_size, str(folder), layout, False)
    logits, gradients = largest_differences(ranks, layout, config, model, reference.renamed)
    report.add(TITLE, HEADER, name, str(layout), logits, gradients)
    largest = float(ranks[0][0].abs().max())
    # fp32 rounds in proportion: transformers' logits of Gemma 3, up to 6.5, are 9e-6 from its own in float64.
    assert logits < TOLERANCE * max(1.0, largest)
    assert gradients < TOLERANCE
    assert largest > 0.5


@pytest.mark.parametrize("name", DENSE_REFERENCES)
def test_files_come_back(folders: dict[str, tuple[Path, Any]], tmp_path: Path, name: str) -> None:
    """Config, sizes and bits; transformers reads what is written."""
    (folder, model), reference = folders[name], DENSE_REFERENCES[name]
    source, back = open_weights(folder), tmp_path / "back"
    for path in (tmp_path / "native", back):
        path.mkdir()
    write_native(source, tmp_path / "native", None)
    native = open_weights(tmp_path / "native")
    assert native.config == source.config
    assert source.config.num_parameters == sum(p.numel() for p in model.parameters())
    write_hugging_face(native, back, None, 1 << 30)
    assert open_weights(back).config == source.config
    written, wanted = load_file(back / "model.safetensors"), load_file(folder / "model.safetensors")
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[key], wanted[key]) for key in wanted)
    if reference.written:
        return
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(logits_of(again.eval(), tokens_of(125)), logits_of(model, tokens_of(125)))


PUBLISHED = sorted(
    (family, name)
    for family in {reference.family for reference in DENSE_REFERENCES.values()}
    for name in find_family(family).sizes
)


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_configs_of_published_sizes_survive_writing(family: str, size: str) -> None:
    table = find_family(family)
    config = table.read_config(table.sizes[size])
    assert table.read_config(json.loads(json.dumps(table.write_config(config)))) == config
