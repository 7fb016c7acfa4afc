"""Every family computes what its reference computes, under every kind of layout: logits and gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_ckpt.writers.huggingface import write_hugging_face
from ascendspeed_ckpt.writers.huggingface_view import HuggingFaceView
from ascendspeed_ckpt.writers.native import write_native
from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.models.families.packing import Packed
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import HuggingFaceSource, Index, open_weights
from ascendspeed_core.weights.source import CheckpointError
from core.family_cases import TOLERANCE, largest_differences, ours, tokens_of
from support.families import REFERENCES, logits_of
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

TITLE = "Families against their references, fp32: largest absolute difference"
HEADER = ("model", "layout", "logits", "gradients")
LAYOUTS = [Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2, sequence_parallel=True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Folder and model of every reference."""
    made = {}
    for name, reference in REFERENCES.items():
        folder = tmp_path_factory.mktemp("reference")
        made[name] = (folder, reference.save(folder))
    return made


CASES: list[Any] = [(name, layout) for name in REFERENCES for layout in LAYOUTS]
# Eight devices share four key-value heads, whose norms then stand on all of them.
CASES += [
    ("Qwen 3", Layout(tp=8)),
    pytest.param("Qwen 2", Layout(tp=8), marks=pytest.mark.nightly),
    pytest.param("Mistral", Layout(tp=4, pp=2), marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_logits_and_gradients(
    workers: WorkerPool,
    report: ReportTables,
    folders: dict[str, tuple[Path, Any]],
    name: str,
    layout: Layout,
) -> None:
    folder, model = folders[name]
    config = open_weights(folder).config
    assert config.family == REFERENCES[name].family
    ranks = workers.run(ours, layout.world_size, str(folder), layout, False)
    logits, gradients = largest_differences(ranks, layout, config, model)
    report.add(TITLE, HEADER, name, str(layout), logits, gradients)
    assert logits < TOLERANCE
    assert gradients < TOLERANCE
    assert float(ranks[0][0].abs().max()) > 0.5


@pytest.mark.parametrize("name", ["LLaMA 2 70B", "Qwen 2", "Qwen 3", "Bloom", "Baichuan 13B"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2, sequence_parallel=True)], ids=str)
def test_joined_projections_compute_the_same(
    workers: WorkerPool,
    report: ReportTables,
    folders: dict[str, tuple[Path, Any]],
    name: str,
    layout: Layout,
) -> None:
    folder, model = folders[name]
    ranks = workers.run(ours, layout.world_size, str(folder), layout, True)
    logits, gradients = largest_differences(ranks, layout, open_weights(folder).config, model)
    report.add(TITLE, HEADER, f"{name}, joined projections", str(layout), logits, gradients)
    assert max(logits, gradients) < TOLERANCE


@pytest.mark.parametrize("name", REFERENCES)
def test_weights_and_config_survive_the_round_trip(
    folders: dict[str, tuple[Path, Any]], tmp_path: Path, name: str
) -> None:
    folder, model = folders[name]
    source = open_weights(folder)
    for part in ("native", "back", "sharded"):
        (tmp_path / part).mkdir()
    write_native(source, tmp_path / "native", None)
    native = open_weights(tmp_path / "native")
    assert native.config == source.config
    write_hugging_face(native, tmp_path / "back", None, 1 << 30)
    write_hugging_face(native, tmp_path / "sharded", None, 20_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    want = dict(model.named_parameters())
    for part in ("back", "sharded"):
        back = open_weights(tmp_path / part)
        assert isinstance(back, HuggingFaceSource)
        assert back.config == source.config
        names = HuggingFaceView(back)
        assert names.tensors().keys() == want.keys()
        for their_name, tensor in want.items():
            assert torch.equal(names.read(their_name), tensor)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((folder / "config.json").read_text())
    if name != "Aquila":
        assert written["architectures"] == original["architectures"]


@pytest.mark.parametrize("name", [name for name, r in REFERENCES.items() if r.classes and not r.written])
def test_transformers_reads_what_we_write(
    folders: dict[str, tuple[Path, Any]], tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    folder, model = folders[name]
    write_hugging_face(open_weights(folder), tmp_path, None, 1 << 30)
    again, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = tokens_of(125)
    assert torch.equal(logits_of(again.eval(), tokens), logits_of(model, tokens))


class Recorder(HuggingFaceSource):
    """Remembers how many rows of each of their tensors were read."""

    def __init__(self, path: Path) -> None:
        self.rows: dict[str, int] = {}
        super().__init__(path)

    def _read(self, theirs: str, index: Index) -> torch.Tensor:
        read = super()._read(theirs, index)
        self.rows[theirs] = self.rows.get(theirs, 0) + read.shape[0]
        return read


def rows_read(folder: str, layout: Layout) -> dict[str, int]:
    source = Recorder(Path(folder))
    load_model(source, ParallelMesh.create(Device("cpu"), layout), torch.float32)
    return source.rows


@pytest.mark.parametrize(
    ("name", "tensor", "rows"),
    [
        ("Bloom", "transformer.h.0.self_attention.query_key_value.weight", 3 * 48),
        ("Bloom", "transformer.h.0.self_attention.query_key_value.bias", 3 * 48),
        ("Baichuan 13B", "model.layers.0.self_attn.W_pack.weight", 3 * 32),
    ],
)
def test_a_device_reads_only_its_rows_of_a_packed_tensor(
    workers: WorkerPool, folders: dict[str, tuple[Path, Any]], name: str, tensor: str, rows: int
) -> None:
    for read in workers.run(rows_read, 2, str(folders[name][0]), Layout(tp=2)):
        assert read[tensor] == rows // 2


@pytest.mark.parametrize("order", ["stacked", "by_head"])
@pytest.mark.parametrize("key_value_heads", [1, 2, 8])
def test_any_slice_of_a_packed_tensor_is_that_slice(order: Any, key_value_heads: int) -> None:
    config = tiny_config(num_key_value_heads=key_value_heads)
    sizes = [8 * 4, key_value_heads * 4, key_value_heads * 4]
    parts = [torch.arange(rows) + 1000 * part for part, rows in enumerate(sizes)]
    groups = key_value_heads if order == "by_head" else 1
    packed = torch.cat([part.view(groups, -1) for part in parts], dim=1).flatten()
    for part, tensor in enumerate(parts):
        rule = Packed(part, order)
        assert rule.num_rows(config, len(packed)) == len(tensor)
        for start in range(len(tensor)):
            for stop in range(start, len(tensor) + 1):
                found = [packed[rows] for rows in rule.packed_slices(config, len(packed), slice(start, stop))]
                assert torch.equal(torch.cat([*found, tensor[:0]]), tensor[start:stop])
    for start in range(len(packed)):
        for stop in range(start, len(packed) + 1):
            contents = Packed(0, order).unpacked_slices(config, len(packed), slice(start, stop))
            found = torch.full((stop - start,), -1)
            for part, rows, where in contents:
                found[where] = parts[part][rows]
            assert torch.equal(found, packed[start:stop])


def test_bloom_without_its_head_has_shorter_names(
    folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    """As bigscience/bloom is published: saved from the model without its head."""
    folder, model = folders["Bloom"]
    model.transformer.save_pretrained(tmp_path)
    source, whole = open_weights(tmp_path), open_weights(folder)
    assert not any(name.startswith("transformer.") for name in source._stored)  # type: ignore[union-attr]
    assert source.tensors() == whole.tensors()
    assert all(torch.equal(source.read(name), whole.read(name)) for name in whole.tensors())


def test_a_packed_tensor_of_another_size_is_refused(
    folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder, _ = folders["Baichuan 7B"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.W_pack.weight"] = torch.zeros(95, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"W_pack.weight has 95 rows, the config makes it 96"):
        open_weights(tmp_path).tensors()


@pytest.mark.parametrize("name", REFERENCES)
def test_the_number_of_parameters_is_the_models(folders: dict[str, tuple[Path, Any]], name: str) -> None:
    folder, model = folders[name]
    assert open_weights(folder).config.num_parameters == sum(p.numel() for p in model.parameters())
