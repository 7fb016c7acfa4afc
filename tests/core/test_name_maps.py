"""Name tables hold experts one by one or all in one tensor, in both directions, bit for bit, slice by slice."""

import importlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ascendspeed_ckpt import write_hugging_face
from ascendspeed_ckpt.writers.packed_slabs import packed_slabs
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.config.sharding import SHARDING, ModuleSharding, Partition
from ascendspeed_core.weights import BaseWeightSource, HuggingFaceSource, Index, TensorInfo
from ascendspeed_core.weights.external.name_maps import NameMap, NameRule
from ascendspeed_core.weights.external.sharded_tensors import ShardedTensors
from ascendspeed_core.weights.shard_layout import shard_layout
from ascendspeed_core.weights.source import CheckpointError
from support.models import tiny_config

LAYERS, EXPERTS, HIDDEN, WIDTH = 3, 4, 8, 10
OURS = "layers.{layer}.mlp.experts.{expert}."
"""Each expert's matrices by themselves: gate and up [F, H], down [H, F]."""
STACKED = "layers.{layer}.mlp.experts."
"""Those of all experts in one tensor: [E, F, H] and [E, H, F]."""


def rules(layout: str) -> str:
    """The rows of a made-up family for one layout of their files."""
    experts, block = "model.layers.{layer}.mlp.experts", "model.layers.{layer}.mlp.experts.{expert}"
    if layout == "per expert":
        return "".join(
            f"WeightRule('{OURS}{name}_proj.weight', '{block}.{name}_proj.weight'),"
            for name in ("gate", "up", "down")
        )
    if layout == "stacked by us":
        return "".join(
            f"WeightRule('{STACKED}{name}_proj.weight', '{block}.{name}_proj.weight'),"
            for name in ("gate", "up", "down")
        )
    ours = STACKED if layout == "fused by both" else OURS
    transposed = layout == "fused, transposed"
    if layout == "fused by both":
        return "".join(
            f"WeightRule('{ours}{name}_proj.weight', '{experts}.{name}_proj'),"
            for name in ("gate", "up", "down")
        )
    return (
        f"WeightRule('{ours}gate_proj.weight', '{experts}.gate_up_proj', packed=EqualParts(0), "
        f"transposed={transposed}),"
        f"WeightRule('{ours}up_proj.weight', '{experts}.gate_up_proj', packed=EqualParts(1), "
        f"transposed={transposed}),"
        f"WeightRule('{ours}down_proj.weight', '{experts}.down_proj', transposed={transposed}),"
    )


SHAPES = {
    "per expert": {
        "mlp.experts.3.gate_proj.weight": (WIDTH, HIDDEN),
        "mlp.experts.3.down_proj.weight": (HIDDEN, WIDTH),
    },
    "stacked by us": {"mlp.experts.3.up_proj.weight": (WIDTH, HIDDEN)},
    "fused": {
        "mlp.experts.gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN),
        "mlp.experts.down_proj": (EXPERTS, HIDDEN, WIDTH),
    },
    "fused, transposed": {
        "mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDTH),
        "mlp.experts.down_proj": (EXPERTS, WIDTH, HIDDEN),
    },
    "fused by both": {"mlp.experts.gate_proj": (EXPERTS, WIDTH, HIDDEN)},
}
"""Some tensors of the files of each layout."""

FAMILY = """
from dataclasses import replace
from ascendspeed_core.models.families import EqualParts, WeightRule
from ascendspeed_core.models.families.base import count_layers
from ascendspeed_core.models.families.llama import LLAMA

def is_dense(config, indices):
    return indices["layer"] == 0

MIXED = replace(
    LLAMA,
    name="mixed",
    model_type="mixed",
    architectures=("MixedForCausalLM",),
    indices={{"layer": count_layers, "expert": lambda config: {experts}}},
    rules=(
        WeightRule("embedding.weight", "model.embed_tokens.weight"),
        WeightRule("layers.{{layer}}.mlp.up_proj.weight", "model.layers.{{layer}}.mlp.up_proj.weight", when=is_dense),
        {rules}
    ),
)
"""


@dataclass
class Tensors(BaseWeightSource):
    """Tensors in memory that remember how many elements were read."""

    config: ModelConfig
    by_name: Mapping[str, torch.Tensor]
    kind: str = "test"
    path: Path | None = None
    elements: dict[str, int] = field(default_factory=dict)

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in self.by_name.items()}

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        found = self.by_name[name][index]
        self.elements[name] = self.elements.get(name, 0) + found.numel()
        return found


def config() -> ModelConfig:
    return tiny_config(num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=WIDTH).model_copy(
        update={"family": "mixed"}
    )


def our_tensors(is_stacked: bool) -> dict[str, torch.Tensor]:
    """Random weights: a dense MLP in the first layer, experts in all."""
    draw = torch.Generator().manual_seed(5)
    found = {
        "embedding.weight": torch.randn(128, 8, generator=draw),
        "layers.0.mlp.up_proj.weight": torch.randn(WIDTH, HIDDEN, generator=draw),
    }
    for layer, name in itertools.product(range(LAYERS), ("gate", "up", "down")):
        shape = (HIDDEN, WIDTH) if name == "down" else (WIDTH, HIDDEN)
        experts = torch.randn(EXPERTS, *shape, generator=draw)
        if is_stacked:
            found[f"layers.{layer}.mlp.experts.{name}_proj.weight"] = experts
        else:
            found |= {
                f"layers.{layer}.mlp.experts.{e}.{name}_proj.weight": experts[e] for e in range(EXPERTS)
            }
    return found


Install = Callable[[str, int], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package with the made-up family, as users add families."""
    import sys

    folder = tmp_path / "site"
    info = folder / "mixed-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mixed\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ascendspeed_core.families]\nmixed = mixed_family:MIXED\n")
    monkeypatch.syspath_prepend(folder)

    def write(layout: str, experts: int = EXPERTS) -> None:
        sys.modules.pop("mixed_family", None)
        # Another name of the compiled file is not looked for: the source may change within a second.
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        (folder / "mixed_family.py").write_text(FAMILY.format(rules=rules(layout), experts=experts))
        importlib.invalidate_caches()

    yield write
    sys.modules.pop("mixed_family", None)


def any_slices(shape: tuple[int, ...]) -> Iterator[Index]:
    """The whole tensor, single rows, and some boxes inside."""
    yield ()
    draw = torch.Generator().manual_seed(1)
    for _ in range(12):
        ends = [sorted(torch.randperm(length + 1, generator=draw)[:2].tolist()) for length in shape]
        yield tuple(slice(start, stop) for start, stop in ends)


@pytest.mark.parametrize("layout", SHAPES)
def test_hugging_face_folders_there_and_back(install: Install, tmp_path: Path, layout: str) -> None:
    install(layout, EXPERTS)
    ours = our_tensors(layout in ("stacked by us", "fused by both"))
    (tmp_path / "hf").mkdir()
    source = Tensors(config(), ours)
    write_hugging_face(source, tmp_path / "hf", None, 2_000)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert source.elements == {name: tensor.numel() for name, tensor in ours.items()}
    stored = {
        name: t for path in (tmp_path / "hf").glob("*.safetensors") for name, t in load_file(path).items()
    }
    for name, shape in SHAPES[layout].items():
        assert stored[f"model.layers.2.{name}"].shape == shape
    back = HuggingFaceSource(tmp_path / "hf")
    assert back.tensors() == source.tensors()
    for name, tensor in ours.items():
        for index in any_slices(tuple(tensor.shape)):
            assert torch.equal(back.read(name, index), tensor[index]), (name, index)


def test_fused_tensors_hold_what_their_layout_says(install: Install, tmp_path: Path) -> None:
    install("fused, transposed", EXPERTS)
    ours = our_tensors(is_stacked=False)
    write_hugging_face(Tensors(config(), ours), tmp_path, None, 1 << 30)
    stored = load_file(tmp_path / "model.safetensors")
    for expert in range(EXPERTS):
        gate, up, down = (
            ours[f"layers.1.mlp.experts.{expert}.{n}_proj.weight"] for n in ("gate", "up", "down")
        )
        fused = stored["model.layers.1.mlp.experts.gate_up_proj"][expert]
        assert torch.equal(fused, torch.cat([gate, up]).T)
        assert torch.equal(stored["model.layers.1.mlp.experts.down_proj"][expert], down.T)


def test_only_the_slices_asked_for_are_read(install: Install, tmp_path: Path) -> None:
    class Recorder(HuggingFaceSource):
        elements = 0

        def _read(self, theirs: str, index: Index) -> torch.Tensor:
            found = super()._read(theirs, index)
            self.elements += found.numel()
            return found

    for layout in ("fused", "fused, transposed"):
        install(layout, EXPERTS)
        write_hugging_face(Tensors(config(), our_tensors(is_stacked=False)), tmp_path, None, 1 << 30)
        source = Recorder(tmp_path)
        source.read("layers.1.mlp.experts.2.up_proj.weight", (slice(2, 5), slice(1, 3)))
        assert source.elements == 3 * 2


def test_another_number_of_experts_is_refused(install: Install, tmp_path: Path) -> None:
    install("fused", EXPERTS)
    write_hugging_face(Tensors(config(), our_tensors(is_stacked=False)), tmp_path, None, 1 << 30)
    install("fused", EXPERTS - 1)
    with pytest.raises(
        CheckpointError, match=r"has shape \[4, 20, 8\], the config makes it begin with \[3\]"
    ):
        HuggingFaceSource(tmp_path).tensors()
    config_json = json.loads((tmp_path / "config.json").read_text())
    assert config_json["architectures"] == ["MixedForCausalLM"]


# External name maps.

SHARDING_OF_EXPERTS = {
    **SHARDING,
    "mlp.experts.{expert}.gate_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
    "mlp.experts.{expert}.up_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
    "mlp.experts.{expert}.down_proj": ModuleSharding(Partition.ROW_PARALLEL),
    "mlp.experts.gate_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
    "mlp.experts.up_proj": ModuleSharding(Partition.COLUMN_PARALLEL),
    "mlp.experts.down_proj": ModuleSharding(Partition.ROW_PARALLEL),
}
GATE, UP, DOWN = (f"{OURS}{name}_proj.weight" for name in ("gate", "up", "down"))
FC = "decoder.layers.{layer}.mlp.experts.linear_fc"
NAME_MAPS = {
    "per expert": (
        NameRule(f"{FC}1.weight{{expert}}", (GATE, UP)),
        NameRule(f"{FC}2.weight{{expert}}", (DOWN,)),
    ),
    "fused": (NameRule(f"{FC}1.weight", (GATE, UP)), NameRule(f"{FC}2.weight", (DOWN,))),
    "fused, transposed": (
        NameRule(f"{FC}1.weight", (GATE, UP), transposed=True),
        NameRule(f"{FC}2.weight", (DOWN,), transposed=True),
    ),
    "stacked by us": tuple(
        NameRule(f"decoder.layers.{{layer}}.{name}.{{expert}}", (f"{STACKED}{name}_proj.weight",))
        for name in ("gate", "up", "down")
    ),
}


@dataclass(frozen=True)
class Stored:
    """A stored tensor in memory."""

    tensor: torch.Tensor

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(tuple(self.tensor.shape), self.tensor.dtype)

    def read(self, index: Index = ()) -> torch.Tensor:
        return self.tensor[index]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("layout", NAME_MAPS)
def test_external_files_there_and_back(layout: str, tp: int) -> None:
    ours = our_tensors(layout == "stacked by us")
    ours = {name: tensor for name, tensor in ours.items() if ".experts." in name}
    source = Tensors(config(), ours)
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    name_map = NameMap(first=(), layer=NAME_MAPS[layout], last=(), head="head", tied_head="head")
    stages = shard_layout(LAYERS, tp, 3)
    sharded, indices = ShardedTensors(shapes), {"expert": range(EXPERTS)}
    files: dict[tuple[int, int, str], torch.Tensor] = {}
    for stage, rank in itertools.product((0, 1), range(tp)):
        chunk = stages.stage(stage, 0)
        for whole in name_map.of_chunk(shapes, config(), chunk, 11, indices, SHARDING_OF_EXPERTS):
            packed = whole.of_rank(rank, tp)
            flat = torch.cat([slab.flatten() for slab in packed_slabs(source, packed, None)])
            files[stage, rank, packed.key] = flat.view(packed.shape)
            sharded.add(packed.key, packed, Stored(flat.view(packed.shape)))
    kept = [name for name in ours if not name.startswith("layers.2.")]
    sharded.check_complete("files", kept)
    assert set(sharded.names()) == set(kept)
    assert sum(tensor.numel() for tensor in files.values()) == sum(math.prod(shapes[name]) for name in kept)
    for name in kept:
        for index in any_slices(shapes[name]):
            assert torch.equal(sharded.read(name, index), ours[name][index]), (name, index)
    if layout == "fused, transposed":
        half = WIDTH // tp
        gate, up = (ours[f"layers.1.mlp.experts.3.{name}_proj.weight"][-half:] for name in ("gate", "up"))
        found = files[1, tp - 1, "decoder.layers.0.mlp.experts.linear_fc1.weight"]
        assert found.shape == (EXPERTS, HIDDEN, 2 * half)
        assert torch.equal(found[3], torch.cat([gate, up]).T)
