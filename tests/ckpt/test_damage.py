"""Damaged, mixed and malicious checkpoints are refused by name; nothing is written and nothing is run."""

import json
import os
import pickle
import shutil
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_ckpt import Conversion, convert
from ascendspeed_ckpt.config import TargetKind
from ascendspeed_ckpt.writers.write_plan import WritePlan
from ascendspeed_core.weights import InitialWeights, open_weights
from ascendspeed_core.weights.shard_layout import shard_layout
from ascendspeed_core.weights.source import CheckpointError
from support.commands import call
from support.models import save_hugging_face, tiny_config

CONFIG = tiny_config(vocab_size=130)
WITNESS = Path("/tmp/ascendspeed-was-here")
FILE = "model_optim_rng.pt"


class Evil:
    """A pickle of this runs a command in a reader that trusts it."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {WITNESS}",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("made")
    source = InitialWeights(CONFIG, 1)
    save_hugging_face(CONFIG, folder / "huggingface")
    kinds: tuple[TargetKind, ...] = ("native", "ascendspeed", "megatron", "torch_dist")
    for kind in kinds:
        target = None
        if kind != "native":
            target = WritePlan(kind, shard_layout(4, tp=2, pp=2))  # type: ignore[arg-type]
        convert(Conversion(source, folder / kind, kind, write_plan=target, verify_logits=False, workers=2))
    return {kind: folder / kind for kind in (*kinds, "huggingface")}


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def ranks(folder: Path) -> list[Path]:
    return sorted((folder / "release").glob(f"mp_rank_*/{FILE}"))


def swap(a: Path, b: Path) -> None:
    middle = a.with_name("swapped")
    a.rename(middle)
    b.rename(a)
    middle.rename(b)


def missing_shard(folder: Path) -> None:
    shutil.rmtree(ranks(folder)[1].parent)


def cut_short(folder: Path) -> None:
    path = ranks(folder)[2]
    path.write_bytes(path.read_bytes()[:-200])


def swapped_ranks(folder: Path) -> None:
    swap(ranks(folder)[0], ranks(folder)[2])


def extra_key(folder: Path) -> None:
    rewrite(
        ranks(folder)[0], lambda c: c["model"].update({"decoder.layers.0.adapter.weight": torch.zeros(2)})
    )


def lacking_key(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        del content["model"]["decoder.layers.0.mlp.linear_fc2.weight"]

    rewrite(ranks(folder)[0], change)


def wrong_dtype(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        key = "decoder.layers.0.mlp.linear_fc2.weight"
        content["model"][key] = content["model"][key].bfloat16()

    rewrite(ranks(folder)[0], change)


def wrong_shape(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        key = "decoder.layers.0.mlp.linear_fc2.weight"
        content["model"][key] = content["model"][key][:, 1:].clone()

    rewrite(ranks(folder)[0], change)


def flipped_byte(folder: Path) -> None:
    path = ranks(folder)[3]
    content = bytearray(path.read_bytes())
    content[-20_000] ^= 1
    path.write_bytes(content)


def other_norm(folder: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["model"]["decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"][0] = 7.0

    rewrite(ranks(folder)[2], change)


def evil_states(folder: Path) -> None:
    rewrite(ranks(folder)[0], lambda c: c.update(optimizer=Evil()))


def evil_arguments(folder: Path) -> None:
    rewrite(ranks(folder)[1], lambda c: c.update(args=Namespace(num_layers=4, extra=Evil())))


def evil_metadata(folder: Path) -> None:
    (folder / "release" / ".metadata").write_bytes(pickle.dumps(Evil()))


def evil_common(folder: Path) -> None:
    torch.save({"args": Evil()}, folder / "release" / "common.pt")


def evil_native(folder: Path) -> None:
    (folder / "iter_0000000" / ".metadata").write_bytes(pickle.dumps(Evil()))


def swapped_pieces(folder: Path) -> None:
    """Two files of the same shapes, as two ranks write them, in one another's place."""
    path = folder / "iter_0000000" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    entries = {index: place for index, place in metadata.storage_data.items() if "gate_proj" in index.fqn}
    first, second = list(entries)[:2]
    metadata.storage_data[first], metadata.storage_data[second] = entries[second], entries[first]
    path.write_bytes(pickle.dumps(metadata))


def tracker_leads_out(folder: Path) -> None:
    (folder / "latest_checkpointed_iteration.txt").write_text("../other")


def release_is_a_link(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    (folder / "release").rename(elsewhere)
    (folder / "release").symlink_to(elsewhere)


def file_is_a_link(folder: Path) -> None:
    path = ranks(folder)[0]
    elsewhere = folder.parent / "elsewhere.pt"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def weights_are_a_link(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.rename(folder.parent / "elsewhere.safetensors")
    path.symlink_to(folder.parent / "elsewhere.safetensors")


def metadata_leads_out(folder: Path) -> None:
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"../{place.relative_path}"
    path.write_bytes(pickle.dumps(metadata))


BAD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a missing shard": ("megatron", missing_shard, "lacks tensor rank 0 of stage 1"),
    "a file cut short": (
        "ascendspeed",
        cut_short,
        "is damaged or no file of torch.save (torch 1.6 or later)",
    ),
    "swapped ranks": ("ascendspeed", swapped_ranks, "is not tensor rank 0 of stage 0 of this checkpoint"),
    "an extra key": (
        "megatron",
        extra_key,
        "that the model does not have, first decoder.layers.0.adapter.weight",
    ),
    "a key too few": ("megatron", lacking_key, "lacks decoder.layers.0.mlp.linear_fc2.weight"),
    "another format in one rank": ("megatron", wrong_dtype, "is stored as float32, "),
    "another shape": ("megatron", wrong_shape, "has shape [32, 23], the model's is [32, 24]"),
    "a flipped byte": ("megatron", flipped_byte, "is damaged: the checksum of data/"),
    "a norm that differs": ("megatron", other_norm, "should be the same in"),
    "code beside the weights": (
        "megatron",
        evil_states,
        "asks for posix.system, which no checkpoint needs; refused",
    ),
    "code in the arguments": (
        "ascendspeed",
        evil_arguments,
        "asks for posix.system, which no checkpoint needs",
    ),
    "code in .metadata": (
        "torch_dist",
        evil_metadata,
        "asks for posix.system, which no checkpoint needs; refused",
    ),
    "code in common.pt": (
        "torch_dist",
        evil_common,
        "asks for posix.system, which no checkpoint needs; refused",
    ),
    "code in a native .metadata": ("native", evil_native, "asks for posix.system, which no checkpoint needs"),
    "swapped pieces": ("native", swapped_pieces, "files were swapped"),
    "a tracker that leads out": ("megatron", tracker_leads_out, "says '../other', "),
    "a folder that is a link": ("megatron", release_is_a_link, "is not a folder in"),
    "a file that is a link": ("megatron", file_is_a_link, "is outside the folder; refused"),
    "weights that are a link": ("huggingface", weights_are_a_link, "is outside the folder; refused"),
    "pieces that lead out": ("torch_dist", metadata_leads_out, "which is outside the folder; refused"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named_and_nothing_is_written(made: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, spoil, complaint = BAD[case]
    WITNESS.unlink(missing_ok=True)
    shutil.copytree(made[kind], tmp_path / "bad")
    spoil(tmp_path / "bad")
    before = sorted(tmp_path.iterdir())
    done = call(
        "asd-ckpt", "convert", "--load", tmp_path / "bad", "--save", tmp_path / "out", "--to", "huggingface"
    )
    assert done.status == 1, done.stderr
    assert complaint in done.complaint
    assert "Traceback" not in done.stderr
    left = [path for path in sorted(tmp_path.iterdir()) if path not in before]
    assert [path.name for path in left] in ([], ["out.incomplete"])
    if left:
        refused = call("asd-ckpt", "inspect", tmp_path / "out.incomplete")
        assert "was not completed" in refused.complaint
    assert not WITNESS.exists()


def test_ranks_that_another_program_wrote_are_cross_checked(made: dict[str, Path], tmp_path: Path) -> None:
    """Without our record the process that wrote a file tells its place."""
    shutil.copytree(made["megatron"], tmp_path / "run")
    (tmp_path / "run/release/ascendspeed.json").unlink()

    def as_megatron(rank: int) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            del content["ascendspeed"]
            content["args"].rank, content["args"].world_size = rank, 8

        return change

    # tp 2, dp 2, pp 2: the first data-parallel process of each stage writes.
    for stage in range(2):
        for rank in range(2):
            path = tmp_path / f"run/release/mp_rank_{rank:02d}_{stage:03d}/{FILE}"
            rewrite(path, as_megatron(stage * 4 + rank))
    assert open_weights(tmp_path / "run").config.num_layers == 4
    swap(ranks(tmp_path / "run")[0], ranks(tmp_path / "run")[2])
    with pytest.raises(
        CheckpointError, match="was written by process 1 of 8, which is not tensor rank 0 of stage 0"
    ):
        open_weights(tmp_path / "run")


def test_inert_objects_of_other_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enumerations and random states of packages that are not here stay what they are: names and values."""
    import numpy as np

    from ascendspeed_core.weights.files.torch_files import InertObject, TorchFile

    module: Any = types.ModuleType("ascendspeed.enums")
    module.Kind = Enum("Kind", {"A": 1}, module="ascendspeed.enums")
    monkeypatch.setitem(sys.modules, "ascendspeed", types.ModuleType("ascendspeed"))
    monkeypatch.setitem(sys.modules, "ascendspeed.enums", module)
    content = {"args": Namespace(kind=module.Kind.A), "np_rng_state": np.random.get_state()}
    torch.save(content, tmp_path / "x.pt")
    found = TorchFile(tmp_path / "x.pt").content
    assert isinstance(found["args"].kind, InertObject)
    assert type(found["args"].kind).__name__ == "Kind"
    assert found["np_rng_state"][0] == "MT19937"


def test_numbers_that_do_not_fit_a_format(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_hugging_face(CONFIG, tmp_path / "hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, tmp_path / "hf/model.safetensors", {"format": "pt"})
    done = call(
        "asd-ckpt", "convert", "--load", tmp_path / "hf", "--save", tmp_path / "x", "--dtype", "float16"
    )
    assert done.status == 1
    assert "final_norm.weight holds numbers up to 1e+06, too large for float16" in done.complaint
    assert not (tmp_path / "x").exists()


def test_the_index_of_a_hub_cache_may_use_links(tmp_path: Path) -> None:
    """The hub's own cache keeps files as blobs and links to them."""
    cache = tmp_path / "models--a--b"
    save_hugging_face(CONFIG, cache / "snapshots" / "abc")
    (cache / "blobs").mkdir()
    path = cache / "snapshots" / "abc" / "model.safetensors"
    path.rename(cache / "blobs" / "123")
    path.symlink_to("../../blobs/123")
    assert open_weights(path.parent).read("final_norm.weight").shape == (32,)


def test_a_disk_that_is_full(made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=10))
    done = call("asd-ckpt", "convert", "--load", made["native"], "--save", tmp_path / "x")
    assert "has 10 bytes free" in done.complaint
    assert list(tmp_path.iterdir()) == []


def test_a_folder_within_the_input_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["native"], tmp_path / "run")
    done = call("asd-ckpt", "convert", "--load", tmp_path / "run", "--save", tmp_path / "run" / "hf")
    assert "lie inside each other" in done.complaint
    assert json.loads((tmp_path / "run/iter_0000000/checkpoint.json").read_text())["iteration"] == 0
