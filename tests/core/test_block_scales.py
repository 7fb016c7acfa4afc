"""Weights with block scales are read as the plain ones that the published rules make of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import Index, TensorInfo, open_weights
from ascendspeed_core.weights.huggingface.block_scales import Fp8Tensor, MxFp4Tensor, plain_tensors
from ascendspeed_core.weights.source import CheckpointError
from support.families import EXPERT_REFERENCES
from support.models import save_hugging_face, tiny_config

BLOCK = (5, 7)


@dataclass(frozen=True)
class Held:
    """A tensor in memory, as a stored one."""

    tensor: torch.Tensor

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(tuple(self.tensor.shape), self.tensor.dtype)

    def read(self, index: Index = ()) -> torch.Tensor:
        return self.tensor[index]


def random_slices(shape: tuple[int, ...], count: int) -> list[Index]:
    generator = torch.Generator().manual_seed(count)
    found: list[Index] = [()]
    for _ in range(count):
        ends = [sorted(torch.randint(0, length + 1, (2,), generator=generator).tolist()) for length in shape]
        found.append(tuple(slice(*pair) for pair in ends))
    return found


def quantise(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements in e4m3 and a scale for each block; the largest element of a block becomes 448."""
    grid = [-(-length // size) for length, size in zip(weight.shape, block, strict=True)]
    scales, elements = torch.empty(grid), torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(grid[0]):
        for column in range(grid[1]):
            at = tuple(slice(n * size, (n + 1) * size) for n, size in zip((row, column), block, strict=True))
            scales[row, column] = weight[at].abs().max() / 448
            elements[at] = (weight[at] / scales[row, column]).to(torch.float8_e4m3fn)
    return elements, scales


def test_fp8_is_the_rule_of_deepseek() -> None:
    """Block by block, in fp32, then bf16; and what transformers makes of it, where blocks divide the matrix."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(23, 40, generator=torch.Generator().manual_seed(1))
    elements, scales = quantise(weight, BLOCK)
    want = torch.empty(weight.shape)
    for row in range(23):
        for column in range(40):
            want[row, column] = elements[row, column].float() * scales[row // 5, column // 7]
    stored = Fp8Tensor(Held(elements), Held(scales), BLOCK)
    for index in random_slices((23, 40), 50):
        assert torch.equal(stored.read(index), want.to(torch.bfloat16)[index])
    # e4m3 has four bits of mantissa, one of them hidden.
    assert float((stored.read().float() - weight).abs().max()) < float(weight.abs().max()) / 16
    even, scales = quantise(weight[:20, :35], BLOCK)
    theirs = Fp8Dequantize(None)._dequantize_one(even, scales, torch.bfloat16)
    assert torch.equal(Fp8Tensor(Held(even), Held(scales), BLOCK).read(), theirs)


def test_mxfp4_is_the_rule_of_transformers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(0, 256, (3, 6, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 150, (3, 6, 2), dtype=torch.uint8, generator=generator)
    want = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16)
    stored = MxFp4Tensor(Held(blocks), Held(scales))
    assert stored.info == TensorInfo(tuple(want.shape), torch.bfloat16)
    for index in random_slices((3, 64, 6), 50):
        assert torch.equal(stored.read(index), want[index])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LLaMA in bf16 whose layers are in FP8 with blocks of 5 x 7, and the plain one beside it."""
    save_hugging_face(tiny_config(), tmp_path / "plain")
    tensors, config = {}, json.loads((tmp_path / "plain" / "config.json").read_text())
    for name, tensor in load_file(tmp_path / "plain" / "model.safetensors").items():
        tensors[name] = tensor.to(torch.bfloat16)
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensor, BLOCK)
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "fmt": "e4m3"}
    (tmp_path / "fp8").mkdir()
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    return tmp_path / "fp8"


def test_a_folder_in_fp8_is_read_as_plain_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, plain = open_weights(folder), open_weights(folder.parent / "plain")
    assert "weights in fp8 are dequantised to bf16 as they are read" in capsys.readouterr().err
    assert source.config == plain.config
    assert source.tensors().keys() == plain.tensors().keys()
    assert {info.dtype for info in source.tensors().values()} == {torch.bfloat16}
    for name in source.tensors():
        want = plain.read(name)
        assert float((source.read(name).float() - want).abs().max()) <= float(want.abs().max()) / 16


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"weight_block_size": [5]}, r"weight_block_size=\[5\] is not the rows and columns of a block"),
        ({"weight_block_size": [4, 7]}, r"has shape \[.*\], blocks of 4 x 7 make it"),
        ({"weight_block_size": None}, "is quantised with fp8 .* which is not read"),
    ],
)
def test_scales_that_do_not_fit_are_refused(folder: Path, change: dict[str, Any], complaint: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=complaint):
        open_weights(folder)


def test_gpt_oss_in_mxfp4_is_the_plain_model(tmp_path: Path) -> None:
    """The folder as it is published, blocks of 32 along the input, beside one with the weights that they stand for."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    plain, packed = tmp_path / "plain", tmp_path / "packed"
    EXPERT_REFERENCES["gpt-oss"].save(plain)
    packed.mkdir()
    generator, tensors = torch.Generator().manual_seed(3), load_file(plain / "model.safetensors")
    config = json.loads((plain / "config.json").read_text()) | {"intermediate_size": 32}
    held = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    blocked = dict(held)
    for name in [name for name in held if ".experts." in name]:
        del blocked[name]
        rows = 32 if ".down_proj" in name else 64
        if name.endswith("_bias"):
            held[name] = blocked[name] = torch.randn(4, rows, generator=generator).to(torch.bfloat16)
            continue
        blocks = torch.randint(0, 256, (4, rows, 1, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 126, (4, rows, 1), dtype=torch.uint8, generator=generator)
        blocked |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        held[name] = convert_moe_packed_tensors(
            blocks.clone(), scales.clone(), dtype=torch.bfloat16
        ).contiguous()
    (plain / "config.json").write_text(json.dumps(config))
    save_file(held, plain / "model.safetensors", {"format": "pt"})
    (packed / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}})
    )
    save_file(blocked, packed / "model.safetensors", {"format": "pt"})
    source, want = open_weights(packed), open_weights(plain)
    assert source.config == want.config
    assert source.tensors() == want.tensors()
    assert all(torch.equal(source.read(name), want.read(name)) for name in want.tensors())
    # Ours are those that transformers computes with.
    tokens = torch.randint(0, 125, (2, 9), generator=generator)
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    ours = load_model(source, ParallelMesh(Device("cpu"), Layout()), torch.float32)
    assert float((ours(ModelInput(tokens)).logits - theirs(tokens).logits).abs().max()) < 1e-5


def test_elements_without_scales_and_scales_without_elements_are_refused(tmp_path: Path) -> None:
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    scale = Held(torch.ones(1, 1))
    with pytest.raises(
        CheckpointError, match=r"x\.weight_scale_inv is the scale of x\.weight, which is not there"
    ):
        plain_tensors(tmp_path, said, {"x.weight_scale_inv": scale})
    mxfp4 = {"quantization_config": {"quant_method": "mxfp4"}}
    blocks = Held(torch.zeros(2, 4, 1, 16, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match=r"x_blocks has shape \[2, 4, 1, 16\] beside scales of None"):
        plain_tensors(tmp_path, mxfp4, {"x_blocks": blocks})
    floats = Held(torch.zeros(2, 4, 1))
    with pytest.raises(CheckpointError, match="x_blocks and its scales are not both uint8"):
        plain_tensors(tmp_path, mxfp4, {"x_blocks": blocks, "x_scales": floats})
