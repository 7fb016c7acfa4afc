"""Checkpoint and adapter that release 0.1.0 wrote are read by every command of asd-ckpt."""

import json
from pathlib import Path

from ascendspeed_core.weights import open_weights
from support.commands import call

FIXTURES = Path(__file__).parents[1] / "fixtures" / "v0.1.0"
RUN, LORA = FIXTURES / "run", FIXTURES / "lora"


def test_inspect() -> None:
    done = call("asd-ckpt", "inspect", RUN, "--json")
    assert done.status == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["kind"], said["iteration"], said["num_parameters"]) == ("native", 3, 9040)
    assert said["beside the weights"] == ["optimizer", "rng"]
    assert len(said["tensors"]) == 20


def test_convert_there_and_back(tmp_path: Path) -> None:
    there = call("asd-ckpt", "convert", "--load", RUN, "--save", tmp_path / "megatron", "--to", "megatron",
                 "--tensor-model-parallel-size", 2)  # fmt: skip
    assert there.status == 0, there.stderr
    back = call("asd-ckpt", "convert", "--load", tmp_path / "megatron", "--save", tmp_path / "hf")
    assert back.status == 0, back.stderr
    assert call("asd-ckpt", "verify", RUN, tmp_path / "hf").status == 0


def test_merge_lora(tmp_path: Path) -> None:
    done = call("asd-ckpt", "merge-lora", "--load", RUN, "--lora-load", LORA, "--save", tmp_path / "merged",
                "--to", "huggingface")  # fmt: skip
    assert done.status == 0, done.stderr
    base, merged = open_weights(RUN), open_weights(tmp_path / "merged")
    changed = {name for name in base.tensors() if not base.read(name).equal(merged.read(name))}
    layers = json.loads((LORA / "iter_0000003" / "checkpoint.json").read_text())["adapters"]["layers"]
    assert changed == {f"{layer}.weight" for layer in layers}
