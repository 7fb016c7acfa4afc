"""Folders that trainers leave: Hugging Face weights beside the state of DeepSpeed or FSDP, or in it."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascendspeed_core.weights import open_weights
from ascendspeed_core.weights.huggingface.config import read_model_config
from ascendspeed_core.weights.source import CheckpointError
from support.commands import call
from support.models import save_hugging_face, tiny_config
from support.tables import ReportTables

Tensors = dict[str, torch.Tensor]
STEP = "global_step5"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trainer") / "hf"
    save_hugging_face(tiny_config(num_layers=2), path)
    return path


def write_step(folder: Path, tensors: Tensors, stage: int, more: dict[str, object] | None = None) -> Path:
    """Write what DeepSpeed's engine does under ZeRO-1, 2 or 3 with one process."""
    step = folder / STEP
    step.mkdir(parents=True)
    (folder / "latest").write_text(STEP)
    (folder / "zero_to_fp32.py").write_text("# DeepSpeed's")
    shapes = [{name: tensor.shape for name, tensor in tensors.items()}]
    if stage == 3:
        tensors = {name: tensor.new_empty(0) for name, tensor in tensors.items()}
    state = {
        "module": tensors,
        "param_shapes": shapes,
        "dp_world_size": 1,
        "mp_world_size": 1,
        **(more or {}),
    }
    torch.save(state, step / f"{'zero_pp_rank_0_' * (stage == 3)}mp_rank_00_model_states.pt")
    masters = {"optimizer_state_dict": {"single_partition_of_fp32_groups": [torch.zeros(4)]}}
    torch.save(masters, step / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return step


def without_weights(folder: Path, target: Path) -> Path:
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    return target


def read_all(folder: Path) -> Tensors:
    source = open_weights(folder)
    return {name: source.read(name) for name in source.tensors()}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("form", ["safetensors", "bin", "files", "lost step"])
def test_weights_of_hugging_face_beside_a_run_are_read(
    folder: Path, tmp_path: Path, stage: int, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "checkpoint-5"
    shutil.copytree(folder, there)
    (there / "trainer_state.json").write_text("{}")
    tensors = load_file(there / "model.safetensors")
    step = write_step(there, {name: tensor + 1 for name, tensor in tensors.items()}, stage)
    if form != "safetensors":
        (there / "model.safetensors").unlink()
    if form == "bin":
        torch.save(tensors, there / "pytorch_model.bin")
    elif form == "files":
        for number, name in enumerate(tensors, 1):
            save_file({name: tensors[name]}, there / f"model-{number:05d}-of-{len(tensors):05d}.safetensors")
    elif form == "lost step":
        save_file(tensors, there / "model.safetensors")
        shutil.rmtree(step)
    expected = read_all(folder)
    capsys.readouterr()
    found = read_all(there)
    lines = [line for line in capsys.readouterr().err.splitlines() if "not read: " in line]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert len(lines) == 1
    assert f"{there}: read are the Hugging Face weights in it; not read: " in lines[0]
    shown = call("asd-ckpt", "inspect", there)
    assert shown.status == 0
    assert all(name in shown.stdout for name in found)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_in_the_engine_file_are_read(
    folder: Path, tmp_path: Path, stage: int, dtype: torch.dtype, wrapper: str
) -> None:
    there = without_weights(folder, tmp_path / "run")
    tensors = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    step = write_step(there, {wrapper + name: tensor for name, tensor in tensors.items()}, stage)
    stored = torch.load(step / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    expected = without_weights(folder, tmp_path / "expected")
    bare = {name.removeprefix(wrapper): tensor for name, tensor in stored.items()}
    save_file({name: tensor.clone() for name, tensor in bare.items()}, expected / "model.safetensors")
    for path in (there, step):
        source = open_weights(path)
        assert source.kind == "deepspeed"
        assert source.check()
        assert "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt" in source.other_contents()
        found, wanted = read_all(path), read_all(expected)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)


def test_a_config_may_be_given(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "run"
    write_step(there, load_file(folder / "model.safetensors"), 2)
    with pytest.raises(
        CheckpointError, match=r"does not say which; put the model's config.json into it, or name it"
    ):
        open_weights(there)
    shown = call("asd-ckpt", "inspect", there)
    assert shown.status == 0
    assert "model.embed_tokens.weight" in shown.stdout
    source = open_weights(there, config=read_model_config(folder / "config.json"))
    assert torch.equal(source.read("embedding.weight"), open_weights(folder).read("embedding.weight"))


def zero_3(there: Path, tensors: Tensors) -> None:
    write_step(there, tensors, 3)


def two_ranks(there: Path, tensors: Tensors) -> None:
    step = write_step(there, tensors, 2)
    shutil.copy(step / "mp_rank_00_model_states.pt", step / "mp_rank_01_model_states.pt")


def adapter_inside(there: Path, tensors: Tensors) -> None:
    write_step(
        there,
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, 8)},
        2,
    )


def fsdp_whole(there: Path, tensors: Tensors) -> None:
    torch.save(tensors, there / "pytorch_model_fsdp.bin")


def fsdp_shards(there: Path, tensors: Tensors) -> None:
    shards = there / "pytorch_model_fsdp_0"
    shards.mkdir()
    torch.distributed.checkpoint.save(tensors, checkpoint_id=shards, no_dist=True)


def ungathered(there: Path, tensors: Tensors) -> None:
    save_file({name: tensor.new_empty(0) for name, tensor in tensors.items()}, there / "model.safetensors")


def meta(there: Path, tensors: Tensors) -> None:
    torch.save(tensors, there / "consolidated.01.pth")


def value_head(there: Path, tensors: Tensors) -> None:
    torch.save(tensors | {"v_head.summary.weight": torch.zeros(1, 32)}, there / "pytorch_model.bin")


def two_names(there: Path, tensors: Tensors) -> None:
    first = next(iter(tensors))
    torch.save(tensors | {f"_orig_mod.{first}": tensors[first]}, there / "pytorch_model.bin")


def unmerged(there: Path, tensors: Tensors) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    torch.save(tensors | {name: torch.zeros(2, 8)}, there / "pytorch_model.bin")


def git_lfs(there: Path, tensors: Tensors) -> None:
    (there / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


def git_lfs_pickled(there: Path, tensors: Tensors) -> None:
    (there / "pytorch_model.bin").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )


def web_page(there: Path, tensors: Tensors) -> None:
    (there / "model.safetensors").write_text("<!DOCTYPE html><html>Not found</html>")


def old_torch(there: Path, tensors: Tensors) -> None:
    torch.save(tensors, there / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def nested(there: Path, tensors: Tensors) -> None:
    torch.save({"state_dict": tensors, "epoch": 3}, there / "pytorch_model.bin")


UNREADABLE: dict[str, tuple[Callable[[Path, Tensors], None], str]] = {
    "Git LFS": (git_lfs, "it is a pointer of Git LFS, not the file itself; run git lfs pull"),
    "Git LFS, .bin": (git_lfs_pickled, "it is a pointer of Git LFS, not the file itself; run git lfs pull"),
    "web page": (web_page, "it is a web page, not the file itself; download it again"),
    "torch before 1.6": (old_torch, "it was written by torch before 1.6, .*; torch.load it, and"),
    "nested": (nested, "holds epoch, which is no tensor that is read; load the model with"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_files_that_are_something_else(folder: Path, tmp_path: Path, case: str) -> None:
    write, complaint = UNREADABLE[case]
    there = without_weights(folder, tmp_path / "there")
    write(there, load_file(folder / "model.safetensors"))
    with pytest.raises(CheckpointError, match=complaint):
        open_weights(there)


REFUSED: dict[str, tuple[Callable[[Path, Tensors], None], str]] = {
    "ZeRO-3": (zero_3, "in shares of ZeRO-3 .*: python zero_to_fp32.py .* OUT, and put"),
    "tensor-parallel": (two_ranks, "cut for 2 tensor-parallel ranks, which is not read; use the weights"),
    "adapter": (adapter_inside, "with an adapter of peft inside .*; give --lora-load"),
    "FSDP, whole": (fsdp_whole, "pytorch_model_fsdp.bin: all weights of a run under FSDP; rename it"),
    "FSDP, shards": (fsdp_shards, "shards that FSDP wrote; join them with accelerate merge-weights"),
    "not gathered": (ungathered, "so it is empty, as ZeRO-3 and FSDP leave it .*; save again"),
    "Meta": (meta, "consolidated.01.pth: weights under Meta's own names; use"),
    "value head": (value_head, "v_head.summary.weight is TRL's value head, .*; save the model without it"),
    "twice": (two_names, "twice; save the model once"),
    "unmerged": (unmerged, "is an adapter beside the weights of its base; merge it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_with_a_remedy(folder: Path, tmp_path: Path, case: str) -> None:
    write, complaint = REFUSED[case]
    there = without_weights(folder, tmp_path / "there")
    write(there, load_file(folder / "model.safetensors"))
    with pytest.raises(CheckpointError, match=complaint) as raised:
        open_weights(there)
    assert "\n" not in str(raised.value)
    shown = call("asd-ckpt", "inspect", there)
    assert shown.status == 1
    if case != "adapter":
        assert "embed_tokens.weight" in shown.stdout


@pytest.mark.parametrize("case", ["FSDP, whole", "FSDP, shards"])
def test_the_same_without_a_config(folder: Path, tmp_path: Path, case: str) -> None:
    write, complaint = REFUSED[case]
    write(tmp_path, load_file(folder / "model.safetensors"))
    with pytest.raises(CheckpointError, match=complaint):
        open_weights(tmp_path)


def test_a_step_whose_weights_lie_whole_beside(folder: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(folder, there)
    step = write_step(there, load_file(there / "model.safetensors"), 3)
    with pytest.raises(CheckpointError, match=rf"name {there}, in which they lie whole, or join them"):
        open_weights(step)


def test_weights_without_a_config(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.safetensors", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"holds weights but no config\.json; put the config\.json of the model"
    ):
        open_weights(tmp_path)


PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def test_names_of_wrappers_drawn_at_random(folder: Path, tmp_path: Path, report: ReportTables) -> None:
    """torch.compile, FSDP and recomputation wrap the model, or modules anywhere in it."""
    tensors, expected = load_file(folder / "model.safetensors"), read_all(folder)
    tried = disagreements = 0
    for seed in range(20):
        draw = random.Random(seed)
        there = without_weights(folder, tmp_path / str(seed))
        outer = draw.choice(["", "module.", "module.module.", "_orig_mod.", "_forward_module."])
        wrapped = {}
        share = draw.choice([0.0, 0.1, 0.5])
        for name, tensor in tensors.items():
            words = [
                word
                for part in name.split(".")
                for word in ([draw.choice(PARTS), part] if draw.random() < share else [part])
            ]
            wrapped[outer + ".".join(words)] = tensor
        torch.save(wrapped, there / "pytorch_model.bin")
        found = read_all(there)
        tried += 1
        disagreements += found.keys() != expected.keys() or any(
            not torch.equal(found[name], expected[name]) for name in found
        )
    report.add("names of wrappers", ("tried", "disagreements"), tried, disagreements)
    assert not disagreements


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_beside_the_weights_is_named(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "checkpoint-5"
    shutil.copytree(folder, there)
    open_weights(there)
    assert "--lora-load" not in capsys.readouterr().err
    # transformers' from_pretrained would apply it.
    (there / "adapter_config.json").write_text("{}")
    (there / name).write_bytes(b"")
    open_weights(there)
    assert (
        f"{name} beside them, an adapter that transformers would apply, counts only with --lora-load {there}"
        in (capsys.readouterr().err)
    )
