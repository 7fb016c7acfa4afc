"""Conversion gives the same model in the other kind, for transformers too, and nothing half-made."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.weights import open_weights
from core.test_checkpoint import CONFIG, joined, write
from support.commands import Finished, RunningCommand, call
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool


def convert(source: Path, target: Path, *flags: object) -> Finished:
    return call("asd-ckpt", "convert", "--input-model-dir", source, "--output-model-dir", target, *flags)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    source = open_weights(folder)
    return {name: source.read(name) for name in source.tensors()}


@pytest.fixture
def hugging_face(tmp_path: Path, tokenizer_folder: Path) -> Path:
    save_hugging_face(tiny_config(vocab_size=400), tmp_path / "hf", tokenizer=tokenizer_folder)
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(tp=2),
        pytest.param(Layout(tp=8, sequence_parallel=True), marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_what_any_layout_trained_loads_in_transformers(
    workers: WorkerPool, tmp_path: Path, layout: Layout
) -> None:
    written = joined(workers.run(write, layout.world_size, str(tmp_path / "run"), layout, "float32"))
    done = convert(tmp_path / "run", tmp_path / "hf")
    assert done.status == 0, done.stderr
    assert "equal to the source bit for bit" in done.stdout
    assert "holds the same model as" in done.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.model.embed_tokens.weight, written["embedding.weight"])
    assert torch.equal(model.model.layers[3].mlp.down_proj.weight, written["layers.3.mlp.down_proj.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == CONFIG.vocab_size


def num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def test_there_and_back(hugging_face: Path, tmp_path: Path) -> None:
    assert convert(hugging_face, tmp_path / "native").status == 0
    assert call("asd-ckpt", "convert", "--load", tmp_path / "native", "--save", tmp_path / "back").status == 0
    assert open_weights(tmp_path / "back").config == open_weights(hugging_face).config
    original, back = (
        load_file(hugging_face / "model.safetensors"),
        load_file(tmp_path / "back/model.safetensors"),
    )
    assert original.keys() == back.keys()
    assert all(torch.equal(original[name], back[name]) for name in original)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (hugging_face / name).read_bytes()
    ids = AutoTokenizer.from_pretrained(tmp_path / "back")("the year").input_ids
    assert ids == AutoTokenizer.from_pretrained(hugging_face)("the year").input_ids
    same = call("asd-ckpt", "verify", hugging_face, tmp_path / "back")
    assert same.status == 0
    last = same.stdout.splitlines()[-1]
    assert last == f"the same model: 39 tensors ({num_bytes(original):,} bytes), largest difference 0.000e+00"


def test_shards_and_formats(hugging_face: Path, tmp_path: Path) -> None:
    done = convert(
        hugging_face,
        tmp_path / "small",
        "--to",
        "huggingface",
        "--max-shard-size",
        "40KB",
        "--dtype",
        "bfloat16",
    )
    assert done.status == 0, done.stderr
    files = sorted(p.name for p in (tmp_path / "small").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(p.stat().st_size < 45_000 for p in (tmp_path / "small").glob("*.safetensors"))
    index = json.loads((tmp_path / "small" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(tmp_path / "small").values())
    reference = tensors_of(hugging_face)
    for name, tensor in tensors_of(tmp_path / "small").items():
        assert torch.equal(tensor, reference[name].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto").dtype == torch.bfloat16


def test_an_old_folder_of_pickled_weights_is_read(hugging_face: Path, tmp_path: Path) -> None:
    shutil.copytree(hugging_face, tmp_path / "old")
    weights = load_file(tmp_path / "old" / "model.safetensors")
    (tmp_path / "old" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "old" / "pytorch_model.bin")
    assert call("asd-ckpt", "verify", hugging_face, tmp_path / "old").status == 0


def test_verify_names_what_differs(hugging_face: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(hugging_face, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"][3] += 0.5
    save_file(weights, tmp_path / "other" / "model.safetensors")
    done = call("asd-ckpt", "verify", hugging_face, tmp_path / "other")
    assert done.status == 1
    assert "differ in 1 of 39 tensors" in done.complaint
    assert "final_norm.weight: largest difference 5.000e-01" in done.complaint
    assert call("asd-ckpt", "verify", hugging_face, tmp_path / "other", "--tolerance", 0.6).status == 0


def test_inspect(hugging_face: Path) -> None:
    facts = json.loads(call("asd-ckpt", "inspect", hugging_face, "--json").stdout)
    assert facts["kind"] == "huggingface"
    assert facts["num_parameters"] == sum(t.numel() for t in tensors_of(hugging_face).values())
    assert facts["tensors"]["embedding.weight"] == {
        "shape": [400, 32],
        "dtype": "float32",
        "num_bytes": 51200,
    }
    assert "embedding.weight" in call("asd-ckpt", "inspect", hugging_face).stdout


def test_a_dry_run_writes_nothing(hugging_face: Path, tmp_path: Path) -> None:
    done = convert(hugging_face, tmp_path / "native", "--dry-run")
    assert done.status == 0
    assert "39 tensors" in done.stderr
    assert not (tmp_path / "native").exists()


def break_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(folder: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.9.extra": torch.zeros(2)}, folder / "model.safetensors")


def lead_out(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "../hf/model.safetensors")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def code_in_weights(folder: Path) -> None:
    from core.test_checkpoint import _Evil

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Evil()}, folder / "pytorch_model.bin")


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


BAD: dict[str, tuple[Any, str]] = {
    "weights cut short": (break_weights, "cannot be read"),
    "a tensor too few": (drop_tensor, "lacks 1 tensors, first model.layers.2.mlp.up_proj.weight"),
    "a tensor too many": (add_tensor, "holds 1 tensors that llama does not have, first model.layers.9.extra"),
    "a path that leads out": (lead_out, "outside the folder; refused"),
    "code among the weights": (code_in_weights, "which no checkpoint needs; refused, nothing of it was run"),
    "no architecture": (lambda f: (f / "config.json").write_text("{}"), "names neither architectures nor"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights (model.safetensors"),
    "a config that is none": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_refused_and_nothing_is_written(
    hugging_face: Path, tmp_path: Path, case: str
) -> None:
    spoil, complaint = BAD[case]
    shutil.copytree(hugging_face, tmp_path / "bad")
    spoil(tmp_path / "bad")
    done = convert(tmp_path / "bad", tmp_path / "native")
    assert done.status == 1
    assert complaint in done.complaint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "hf"]
    assert not Path("/tmp/ascendspeed-was-here").exists()


def test_shapes_that_do_not_fit_the_config(hugging_face: Path, tmp_path: Path) -> None:
    other_config(hugging_face)
    done = call("asd-infer", "generate", "--load", hugging_face, "--prompt", "x", "--device", "cpu")
    assert done.status == 1
    assert "has shape [48, 32], config.json makes it [64, 32] by intermediate_size=64" in done.complaint


def test_bad_flags(hugging_face: Path, tmp_path: Path) -> None:
    assert (
        "max_shard_size='lots' is not a size"
        in convert(hugging_face, tmp_path / "x", "--max-shard-size", "lots").complaint
    )
    assert convert(hugging_face, tmp_path / "x", "--to", "ggml").status == 2
    assert "does not exist" in convert(tmp_path / "none", tmp_path / "x").complaint
    (tmp_path / "empty").mkdir()
    assert "no tokenizer file" in convert(
        hugging_face, tmp_path / "x", "--tokenizer-name-or-path", tmp_path / "empty"
    ).complaint  # fmt: skip
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("to", ["native", "huggingface"])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_opened_is_copied_with_a_line(
    hugging_face: Path, tmp_path: Path, to: str, name: str
) -> None:
    """The weights are whole, so they are converted; what lies beside them goes along as it is."""
    content = b'{"eos_token": 3}' if name.endswith(".json") else b"no SentencePiece model"
    (hugging_face / name).write_bytes(content)
    done = convert(hugging_face, tmp_path / "out", "--to", to, "--no-verify-logits")
    assert done.status == 0, done.stderr
    assert "holds the same model as" in done.stdout
    lines = [line for line in done.stderr.splitlines() if "the tokenizer was copied as it is" in line]
    assert len(lines) == 1
    assert f"but it cannot be opened: {hugging_face}" in lines[0]
    folder = tmp_path / "out" if to == "huggingface" else tmp_path / "out" / "tokenizer"
    assert (folder / name).read_bytes() == content


def test_dropout_of_a_config_is_named_and_not_converted(hugging_face: Path, tmp_path: Path) -> None:
    content = json.loads((hugging_face / "config.json").read_text()) | {"attention_dropout": 0.1}
    (hugging_face / "config.json").write_text(json.dumps(content))
    done = convert(hugging_face, tmp_path / "out", "--to", "native")
    assert done.status == 0, done.stderr
    assert (
        f"{hugging_face / 'config.json'}: attention_dropout=0.1 is not kept as a part of the model"
        in done.stderr
    )


def test_what_exists_is_kept(hugging_face: Path, tmp_path: Path) -> None:
    assert convert(hugging_face, tmp_path / "native").status == 0
    before = tensors_of(tmp_path / "native")
    done = convert(hugging_face, tmp_path / "native", "--dtype", "bfloat16")
    assert "exists; give --overwrite" in done.complaint
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors_of(tmp_path / "native").items())
    assert convert(hugging_face, tmp_path / "native", "--dtype", "bfloat16", "--overwrite").status == 0
    assert next(iter(tensors_of(tmp_path / "native").values())).dtype == torch.bfloat16


def test_a_killed_conversion_leaves_the_earlier_folder(tmp_path: Path) -> None:
    big = tiny_config(
        vocab_size=20_000, hidden_size=256, num_attention_heads=8, head_dim=32, ffn_hidden_size=2048
    )
    save_hugging_face(big, tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "native", "--no-verify-logits").status == 0
    before = sorted(
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in (tmp_path / "native").rglob("*")
    )
    running = RunningCommand(
        "asd-ckpt", "convert", "--input-model-dir", tmp_path / "hf", "--output-model-dir", tmp_path / "native",
        "--overwrite",
    )  # fmt: skip
    scratch = tmp_path / "native.incomplete"
    end = time.monotonic() + 60
    while not scratch.exists():
        assert time.monotonic() < end
        time.sleep(0.002)
    running.kill_session()
    assert scratch.exists()
    after = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in (tmp_path / "native").rglob("*"))
    assert after == before
    again = convert(tmp_path / "hf", tmp_path / "native", "--overwrite", "--no-verify-logits")
    assert again.status == 0, again.stderr
    assert not scratch.exists()


def test_training_goes_on_from_a_converted_folder(hugging_face: Path, tmp_path: Path, dataset: Path) -> None:
    assert convert(hugging_face, tmp_path / "native").status == 0
    flags: list[object] = [
        "--data-path", dataset, "--seq-length", 16, "--train-iters", 2, "--split", "100,0,0", "--data-cache-path",
        tmp_path / "cache", "--device", "cpu",
    ]  # fmt: skip
    losses = []
    for start in (hugging_face, tmp_path / "native"):
        save = tmp_path / f"from-{start.name}"
        done = call("asd-core", "pretrain", "--load", start, *flags, "--save", save)
        assert done.status == 0, done.stderr
        losses.append(
            [json.loads(line)["lm_loss"] for line in (save / "metrics.jsonl").read_text().splitlines()]
        )
    assert losses[0] == losses[1]
