"""Adapters of AscendSpeed 2023 are read exactly: merged, they give what each of its ranks would have merged."""

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_ckpt import Conversion, convert
from ascendspeed_ckpt.writers.write_plan import WritePlan
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.weights import open_weights
from ascendspeed_core.weights.adapters.ascendspeed import open_adapter
from ascendspeed_core.weights.adapters.lora import loaded_adapters
from ascendspeed_core.weights.adapters.merge import MergedAdapter
from ascendspeed_core.weights.shard_layout import shard_layout
from ascendspeed_core.weights.source import DATA_MANIFEST, CheckpointError
from ascendspeed_data.manifest import read_manifest
from ascendspeed_data.tokenizer import copy_tokenizer, load_tokenizer
from ascendspeed_infer.chat import choose_layout
from support.commands import call
from support.models import save_hugging_face, tiny_config
from support.peft_adapters import make

RANK, ALPHA = 3, 12
ALONG_INPUT = ("attention.dense.weight", "mlp.down_proj.weight")
TARGETS = ("query_key_value", "dense", "gate_proj", "up_proj", "down_proj", "mlp.proj")
SAVED = ("embedding.word_embeddings.weight", "lm_head.lm_head.weight")


def adapt(base: Path, adapter: Path, merged: Path) -> None:
    """Write a random adapter for a checkpoint of 2023, file by file as its ranks did, and the merged weights."""
    states = "model_optim_rng.pt"
    for path in sorted(base.glob(f"release/mp_rank_*/{states}")):
        file = torch.load(path, weights_only=False)
        chunks = [key for key in file if key.startswith("model")]
        # What is whole is the same on all tensor ranks of a stage.
        stage = path.parent.name.split("_")[3:]
        lora: dict[str, Any] = {
            "args": Namespace(lora_r=RANK, lora_alpha=ALPHA),
            "checkpoint_version": 3.0,
            "iteration": 7,
        }
        for chunk in chunks:
            lora[chunk] = {}
            for key, weight in file[chunk].items():
                name = key.removesuffix(".weight")
                whole = torch.Generator().manual_seed(sum(map(ord, f"{stage}{chunk}{key}")))
                own = torch.Generator().manual_seed(sum(map(ord, f"{path.parent.name}{chunk}{key}")))
                if key in SAVED:
                    new = torch.randn(weight.shape, generator=own)
                    lora[chunk][f"{name}.modules_to_save.default.weight"] = new
                    lora[chunk][f"{name}.original_module.weight"] = weight
                    file[chunk][key] = new
                elif name.endswith(TARGETS):
                    out, into = weight.shape
                    of_a, of_b = (own, whole) if key.endswith(ALONG_INPUT) else (whole, own)
                    a, b = torch.randn(RANK, into, generator=of_a), torch.randn(out, RANK, generator=of_b)
                    lora[chunk][f"{name}.lora_A.default.weight"] = a
                    lora[chunk][f"{name}.lora_B.default.weight"] = b
                    file[chunk][key] = weight + b @ a * (ALPHA / RANK)
        for folder, name, content in ((adapter, "iter_0000007", lora), (merged, "release", file)):
            place = folder / name / path.parent.name
            place.mkdir(parents=True)
            torch.save(content, place / states)
    for extra in base.glob("release/*.json"):
        (merged / "release" / extra.name).write_bytes(extra.read_bytes())
    (merged / "latest_checkpointed_iteration.txt").write_text("release")
    (adapter / "latest_checkpointed_iteration.txt").write_text("7")


LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 pp2": {"tp": 2, "pp": 2},
    "virtual pipeline": {"tp": 2, "pp": 2, "layers_per_chunk": 1},
}


@pytest.mark.parametrize("merged_mlp", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_merged(tmp_path: Path, name: str, merged_mlp: bool) -> None:
    config = tiny_config(vocab_size=130, num_key_value_heads=8)
    save_hugging_face(config, tmp_path / "hf")
    target = WritePlan("ascendspeed", shard_layout(config.num_layers, **LAYOUTS[name]), merged_mlp=merged_mlp)
    convert(Conversion(tmp_path / "hf", tmp_path / "base", "ascendspeed", write_plan=target))
    adapt(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    base, want = open_weights(tmp_path / "hf"), open_weights(tmp_path / "merged", config=config)
    adapter = open_adapter(tmp_path / "adapter", base.config)
    got = MergedAdapter(base, adapter)
    assert got.tensors().keys() == want.tensors().keys()
    for tensor in want.tensors():
        # A product of three is added up in another order.
        assert torch.allclose(got.read(tensor), want.read(tensor), rtol=1e-5, atol=1e-5), tensor
    trained = loaded_adapters(base, adapter)
    q, v = (trained.read(f"layers.3.attention.{part}_proj.lora_A.weight") for part in "qv")
    assert torch.equal(q, v)


def adapter_of_two_ranks(folder: Path) -> tuple[Path, ModelConfig]:
    """Make a model and an adapter of it as two tensor ranks saved it."""
    config = tiny_config(vocab_size=130, num_key_value_heads=8)
    save_hugging_face(config, folder / "hf")
    target = WritePlan("ascendspeed", shard_layout(config.num_layers, tp=2))
    convert(Conversion(folder / "hf", folder / "base", "ascendspeed", write_plan=target))
    adapt(folder / "base", folder / "adapter", folder / "merged")
    return folder / "adapter", config


def change(adapter: Path, spoil: Callable[[dict[str, Any]], None]) -> None:
    """Change what every rank saved."""
    for path in adapter.glob("iter_0000007/mp_rank_*/model_optim_rng.pt"):
        content = torch.load(path, weights_only=False)
        spoil(content)
        torch.save(content, path)


def test_a_command_merges_it_and_bad_files_are_refused(tmp_path: Path) -> None:
    adapter_of_two_ranks(tmp_path)

    def merge(save: str) -> Any:
        return call(
            "asd-ckpt", "merge-lora", "--load", tmp_path / "hf", "--lora-load", tmp_path / "adapter", "--save",
            tmp_path / save, "--to", "huggingface",
        )  # fmt: skip

    done = merge("new")
    assert done.status == 0, done.stderr
    assert json.loads((tmp_path / "new" / "config.json").read_text())["vocab_size"] == 130
    path = tmp_path / "adapter/iter_0000007/mp_rank_01/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    part = content["model"].pop("language_model.layers.2.attention.query_key_value.lora_B.default.weight")
    torch.save(content, path)
    assert "lacks part of layers.2.attention" in merge("lacking").complaint
    content["model"]["language_model.layers.2.attention.query_key_value.lora_C.default.weight"] = part
    torch.save(content, path)
    assert "lora_C.default.weight, which is no part of an adapter" in merge("extra").complaint


@pytest.mark.parametrize(
    "ends", [("lora_A.default.weight",), ("lora_B.default.weight",), ("weight",)], ids=str
)
def test_what_all_ranks_lack_is_refused(tmp_path: Path, ends: tuple[str, ...]) -> None:
    """Half of a pair, or a whole layer, in no file."""
    adapter, base = adapter_of_two_ranks(tmp_path)

    def spoil(content: dict[str, Any]) -> None:
        for key in [
            key for key in content["model"] if ".layers.2.mlp.down_proj." in key and key.endswith(ends)
        ]:
            del content["model"][key]

    change(adapter, spoil)
    with pytest.raises(
        CheckpointError, match=r"lacks layers\.2\.mlp\.down_proj\.lora_[AB]\.weight, though other"
    ):
        open_adapter(adapter, base)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    adapter, base = adapter_of_two_ranks(tmp_path)

    def spoil(content: dict[str, Any]) -> None:
        content["model"]["language_model.layers.1.mlp.up_proj.lora_A.default.weight"][0, 3] = float("nan")

    change(adapter, spoil)
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.up_proj\.lora_A\.weight holds values that are no"
    ):
        open_adapter(adapter, base)


@pytest.mark.parametrize("kind", ["huggingface", "native", "ascendspeed"])
def test_a_merged_folder_is_of_the_kind_of_its_base(
    tmp_path: Path, tokenizer_folder: Path, kind: str
) -> None:
    """It keeps tokenizer, layout of conversations and the record of its parts; the verdict says what it was."""
    records = [
        {"instruction": "Add one.", "input": str(number), "output": str(number + 1)} for number in range(3)
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    made = call(
        "asd-data", "preprocess", "--input", tmp_path / "records.jsonl", "--output-prefix", tmp_path / "set",
        "--handler-name", "GeneralInstructionHandler", "--tokenizer-name-or-path", tokenizer_folder,
    )  # fmt: skip
    assert made.status == 0, made.stderr
    manifest = tmp_path / "set_packed.manifest.json"
    save_hugging_face(tiny_config(vocab_size=400), tmp_path / "hf")
    copy_tokenizer(tokenizer_folder, tmp_path / "hf")
    convert(
        Conversion(
            tmp_path / "hf",
            tmp_path / "base",
            kind,  # type: ignore[arg-type]
            write_plan=WritePlan("ascendspeed", shard_layout(4)) if kind == "ascendspeed" else None,
        )
    )
    make(tmp_path / "hf", tmp_path / "adapter", {"r": 2, "target_modules": ["q_proj"]})
    shutil.copyfile(manifest, tmp_path / "adapter" / DATA_MANIFEST)
    done = call(
        "asd-ckpt", "merge-lora", "--load", tmp_path / "base", "--lora-load", tmp_path / "adapter", "--save",
        tmp_path / "merged",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last == (
        f"verdict: {tmp_path}/merged holds the same model as {tmp_path}/base, with the adapter {tmp_path}/adapter "
        "merged into it"
    )
    merged = open_weights(tmp_path / "merged")
    assert merged.kind == kind
    assert merged.tokenizer is not None
    assert merged.data_manifest == read_manifest(manifest)
    shown = call("asd-ckpt", "inspect", tmp_path / "merged")
    record = {"base": f"{tmp_path}/base", "base_kind": kind, "adapter": f"{tmp_path}/adapter"}
    assert f"merged from: {record}" in shown.stdout
    layout = choose_layout(merged, load_tokenizer(merged.tokenizer), None)
    assert layout.name == "GeneralInstructionHandler"


def test_an_adapter_where_weights_are_wanted_names_a_command_that_takes_it(tmp_path: Path) -> None:
    save_hugging_face(tiny_config(), tmp_path / "hf")
    make(tmp_path / "hf", tmp_path / "adapter", {"r": 2, "target_modules": ["q_proj"]})
    done = call("asd-ckpt", "convert", "--load", tmp_path / "adapter", "--save", tmp_path / "out")
    assert done.status == 1
    assert "asd-ckpt merge-lora" in done.complaint
