"""A family that is added by the text of docs/extending.md alone, as a package that is installed."""

import importlib
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ascendspeed_ckpt.writers.huggingface import write_hugging_face
from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.models.families import known_families
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import AscendSpeedError
from support.baichuan import rotary
from support.commands import call
from support.processes import WorkerPool

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"
SIZES = {"vocab_size": 61, "width": 32, "depth": 2, "heads": 4, "context": 64}


def block(language: str, word: str) -> str:
    """The block of the document that speaks of the family."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    (body,) = (body for body in found if word in body)
    return str(body)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages that holds the document's family, first on the path."""
    folder = tmp_path / "site"
    info = folder / "sparrow-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "sparrow.py").write_text(block("python", "SPARROW"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparrow\nVersion: 1.0\n")
    table = re.findall(r'^(\w+) = "(\S+)"$', block("toml", "families"), re.MULTILINE)
    lines = [f"{name} = {target}" for name, target in table]
    (info / "entry_points.txt").write_text("\n".join(["[ascendspeed_core.families]", *lines, ""]))
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    yield folder
    sys.modules.pop("sparrow", None)


def tensors() -> dict[str, torch.Tensor]:
    """Random weights under Sparrow's names."""
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    made = {"embed.weight": draw(61, 32), "head.weight": draw(61, 32)}
    norms = ["norm"]
    for layer in range(2):
        made |= {
            f"blocks.{layer}.qkv.weight": draw(96, 32),
            f"blocks.{layer}.out.weight": draw(32, 32),
            f"blocks.{layer}.up.weight": draw(128, 32),
            f"blocks.{layer}.down.weight": draw(32, 128),
        }
        norms += [f"blocks.{layer}.norm1", f"blocks.{layer}.norm2"]
    for name in norms:
        made |= {f"{name}.weight": 1 + draw(32), f"{name}.bias": draw(32)}
    return made


def sparrow(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The made-up model, written down once more: [B, S] -> [B, S, V]."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (32,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    x = weights["embed.weight"][ids]
    causal = torch.triu(torch.full((ids.shape[1], ids.shape[1]), -torch.inf), 1)
    for layer in range(2):
        at = f"blocks.{layer}"
        packed = norm(x, f"{at}.norm1") @ weights[f"{at}.qkv.weight"].T
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in packed.split(32, dim=-1))
        scores = rotary(q) @ rotary(k).transpose(2, 3) / math.sqrt(8) + causal
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + attended @ weights[f"{at}.out.weight"].T
        inner = F.gelu(norm(x, f"{at}.norm2") @ weights[f"{at}.up.weight"].T, approximate="tanh")
        x = x + inner @ weights[f"{at}.down.weight"].T
    return norm(x, "norm") @ weights["head.weight"].T


def logits(site: str, folder: str, layout: Layout, ids: torch.Tensor) -> torch.Tensor:
    """Of the model in a folder, in a process that has the package."""
    sys.path.insert(0, site)
    importlib.invalidate_caches()
    try:
        mesh = ParallelMesh.create(Device("cpu"), layout)
        model = load_model(open_weights(Path(folder)), mesh, torch.float32)
        with torch.no_grad():
            return gather_logits(model(ModelInput(ids)).logits, model.config.vocab_size, mesh.group("tp"))
    finally:
        sys.path.remove(site)
        sys.modules.pop("sparrow", None)


def test_a_family_is_added_by_the_text_alone(
    workers: WorkerPool, site: Path, tmp_path: Path, dataset: Path
) -> None:
    from safetensors.torch import load_file, save_file

    listed = call("asd-core", "models", "sparrow", "--json")
    assert json.loads(listed.stdout)["num_layers"] == 20
    weights, folder, back = tensors(), tmp_path / "hf", tmp_path / "back"
    folder.mkdir()
    back.mkdir()
    save_file(weights, folder / "model.safetensors")
    hf = {"architectures": ["SparrowForCausalLM"], **SIZES, "activation": "gelu_tanh"}
    (folder / "config.json").write_text(json.dumps(hf))

    ids = torch.randint(0, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    want = sparrow(weights, ids)
    for layout in (Layout(), Layout(tp=2)):
        for got in workers.run(logits, layout.tp, str(site), str(folder), layout, ids):
            # fp32, sums in another order.
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    write_hugging_face(open_weights(folder), back, None, 1 << 30)
    written = load_file(back / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert open_weights(back).config == open_weights(folder).config

    (tmp_path / "model.json").write_text(json.dumps(hf | {"vocab_size": 400}))
    trained = call(
        "asd-core", "pretrain", "--model-config", tmp_path / "model.json", "--data-path", dataset, "--seq-length",
        32, "--micro-batch-size", 2, "--global-batch-size", 4, "--train-iters", 2, "--save", tmp_path / "run",
        "--data-cache-path", tmp_path / "cache",
    )  # fmt: skip
    assert trained.status == 0, trained.stderr
    assert open_weights(tmp_path / "run").config.family == "sparrow"


def test_a_name_that_is_taken_is_refused(site: Path) -> None:
    entry_points = site / "sparrow-1.0.dist-info" / "entry_points.txt"
    entry_points.write_text(entry_points.read_text().replace("sparrow:SPARROW", "sparrow:DOUBLE"))
    with (site / "sparrow.py").open("a") as file:
        file.write("\nfrom dataclasses import replace\nDOUBLE = replace(SPARROW, name='llama')\n")
    with pytest.raises(AscendSpeedError, match="sparrow:DOUBLE takes llama, which another family has"):
        known_families()
