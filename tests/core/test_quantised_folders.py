"""Folders with quantised weights are refused as what they are, by every command alike."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascendspeed_core.weights import open_weights
from ascendspeed_core.weights.huggingface.quantised import METHODS
from ascendspeed_core.weights.source import CheckpointError
from support.commands import call
from support.models import save_hugging_face, tiny_config
from support.tables import ReportTables

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.0.mlp.up_proj."


def integers(kind: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(4, 4, dtype=kind)


# What quantisers write in place of a weight, and their quantization_config.
WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptq": (
        {"qweight": integers(), "qzeros": integers(), "scales": torch.ones(1, 4), "g_idx": integers()},
        {"quant_method": "gptq", "bits": 4},
    ),
    "awq": (
        {"qweight": integers(), "qzeros": integers(), "scales": torch.ones(1, 4)},
        {"quant_method": "awq", "bits": 4},
    ),
    "fp8": (
        {"weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
        # One scale for a whole weight; with blocks it is read.
        {"quant_method": "fp8"},
    ),
    "bitsandbytes": ({"weight": integers(torch.int8), "SCB": torch.ones(4)}, {"load_in_8bit": True}),
    "bitsandbytes 4": (
        {
            "weight": integers(torch.uint8), "weight.absmax": torch.ones(1), "weight.quant_map": torch.ones(16),
            "weight.quant_state.bitsandbytes__nf4": integers(torch.uint8),
        },
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
    "compressed-tensors": (
        {"weight_packed": integers(), "weight_scale": torch.ones(4, 1), "weight_shape": integers(torch.int64)},
        {"quant_method": "compressed-tensors", "config_groups": {}},
    ),
    "mxfp4": (
        {"weight_blocks": integers(torch.uint8), "weight_scales": integers(torch.uint8)},
        {"quant_method": "mxfp4"},
    ),
    "hqq": ({"W_q": integers(torch.uint8), "scale": torch.ones(1)}, {"quant_method": "hqq"}),
    "aqlm": ({"codes": integers(torch.int8), "codebooks": torch.ones(1, 4)}, {"quant_method": "aqlm"}),
    "quanto": ({"weight._data": integers(torch.int8), "weight._scale": torch.ones(1)}, {"quant_method": "quanto"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    save_hugging_face(tiny_config(), folder)
    return folder


def quantised(plain: Path, folder: Path, kind: str, with_config: bool, pickled: bool = False) -> Path:
    tensors: Tensors = load_file(plain / "model.safetensors")
    del tensors[f"{NAME}weight"]
    written, described = WRITTEN[kind]
    tensors |= {f"{NAME}{name}": tensor for name, tensor in written.items()}
    folder.mkdir()
    config = json.loads((plain / "config.json").read_text())
    if with_config:
        config["quantization_config"] = described
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("with_config", [True, False], ids=["named", "unnamed"])
def test_the_method_is_named_with_or_without_a_config(
    plain: Path, tmp_path: Path, report: ReportTables, with_config: bool
) -> None:
    tried = 0
    for kind in WRITTEN:
        method = kind.split(" ", maxsplit=1)[0]
        for pickled in (False, True) if kind != "fp8" else (False,):
            folder = quantised(plain, tmp_path / f"{kind}-{pickled}", kind, with_config, pickled)
            with pytest.raises(
                CheckpointError, match=rf"is quantised with {method} .*load the folder"
            ) as raised:
                open_weights(folder)
            assert ("quantization_config in its config.json" in str(raised.value)) == with_config
            assert NAME in str(raised.value)
            tried += 1
    title = "Quantised folders, by their method"
    report.add(
        title, ("quantization_config", "tried", "not named"), "there" if with_config else "absent", tried, 0
    )


@pytest.mark.parametrize("kind", ["gptq", "fp8"])
def test_every_command_says_it_alike(plain: Path, dataset: Path, tmp_path: Path, kind: str) -> None:
    folder = quantised(plain, tmp_path / "x", kind, with_config=True)
    ids = tmp_path / "ids.jsonl"
    ids.write_text("[1, 5]\n")
    pretrain = ("asd-core", "pretrain", "--seq-length", 8, "--train-iters", 1)
    commands = (
        ("asd-ckpt", "inspect", folder),
        ("asd-ckpt", "convert", "--load", folder, "--save", tmp_path / "out"),
        ("asd-ckpt", "verify", folder, folder),
        ("asd-infer", "generate", "--load", folder, "--prompt-format", "jsonl", "--prompt-file", ids),
        (*pretrain, "--load", folder, "--data-path", dataset, "--dry-run"),
    )
    done = [call(*command) for command in commands]
    assert [one.status for one in done] == [1] * len(done)
    complaints = {one.complaint.partition("is quantised")[2] for one in done}
    assert len(complaints) == 1, complaints
    assert f" with {kind} (" in complaints.pop()


def test_a_config_that_says_quantised_over_plain_weights(plain: Path, tmp_path: Path) -> None:
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"no tensor of its files is quantised; remove quantization_config"
    ):
        open_weights(tmp_path)


def test_a_format_alone_tells(plain: Path, tmp_path: Path) -> None:
    tensors = load_file(plain / "model.safetensors")
    tensors[f"{NAME}weight"] = tensors[f"{NAME}weight"].to(torch.int8)
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"is quantised \(1 tensors such as {NAME}weight, stored as int8\)"
    ):
        open_weights(tmp_path)


def test_methods_are_described() -> None:
    assert all(method.name and method.remedy for method in METHODS)
