"""Merged adapters equal peft's, however the base is kept and cut; vocabularies grow and shrink by their rule."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascendspeed_core.weights import open_weights
from ascendspeed_core.weights.adapters.ascendspeed import open_adapter
from ascendspeed_core.weights.adapters.merge import MergedAdapter
from ascendspeed_core.weights.source import CheckpointError
from ckpt.test_writers import digests, external, to
from support.commands import Finished, call
from support.families import REFERENCES
from support.models import save_hugging_face, tiny_config

CONFIG = tiny_config(vocab_size=130)


def make_adapter(base: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Make a random adapter with peft, save it, and return what peft's own merge gives."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    adapted: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    adapted.save_pretrained(folder)
    merged: dict[str, torch.Tensor] = adapted.merge_and_unload().state_dict()
    return merged


def with_adapter(base: Path, adapter: Path) -> MergedAdapter:
    source = open_weights(base)
    return MergedAdapter(source, open_adapter(adapter, source.config))


def merge(base: Path, adapter: Path, target: Path, *flags: object) -> Finished:
    return call("asd-ckpt", "merge-lora", "--load", base, "--lora-load", adapter, "--save", target, "--to",
                "huggingface", *flags)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    save_hugging_face(CONFIG, folder)
    return folder


ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "everything": {"target_modules": "all-linear"},
    "rank-stabilised": {"target_modules": ["o_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 40},
    },
    "embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "saved modules": {"target_modules": ["gate_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTERS)
def test_merging_is_what_peft_does(base: Path, tmp_path: Path, case: str) -> None:
    want = make_adapter(base, tmp_path / "adapter", **ADAPTERS[case])
    done = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert done.status == 0, done.stderr
    before = load_file(base / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == before.keys()
    changed = 0
    for name, tensor in merged.items():
        # fp32: the product of two narrow matrices, in another order of sums.
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-6)
        changed += not torch.equal(tensor, before[name])
    assert changed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_how_the_base_is_kept_and_cut_does_not_matter(base: Path, tmp_path: Path, dtype: str) -> None:
    make_adapter(base, tmp_path / "adapter", **ADAPTERS["everything"])
    kept = tmp_path / "kept"
    assert (
        call(
            "asd-ckpt", "convert", "--load", base, "--save", kept, "--to", "huggingface", "--dtype", dtype
        ).status
        == 0
    )
    assert merge(kept, tmp_path / "adapter", tmp_path / "merged").status == 0
    want = digests(tmp_path / "merged")
    for kind, layout in (("ascendspeed", {"tp": 4}), ("megatron", {"tp": 2, "pp": 2}), ("torch_dist", {})):
        target = external(kind, CONFIG, **layout)
        cut = to(kept, tmp_path / kind, target.kind, target)
        done = merge(cut, tmp_path / "adapter", tmp_path / f"from {kind}")
        assert done.status == 0, done.stderr
        assert digests(tmp_path / f"from {kind}") == want
        # The other order: merge while cutting, then put together.
        source = with_adapter(kept, tmp_path / "adapter")
        merged = to(source, tmp_path / f"{kind} merged", target.kind, target)
        assert digests(to(merged, tmp_path / f"{kind} back", "huggingface")) == want


def test_a_packed_projection_is_merged(tmp_path: Path) -> None:
    REFERENCES["Bloom"].save(tmp_path / "hf")
    want = make_adapter(
        tmp_path / "hf", tmp_path / "adapter", target_modules=["query_key_value", "dense_4h_to_h"]
    )
    done = merge(tmp_path / "hf", tmp_path / "adapter", tmp_path / "merged")
    assert done.status == 0, done.stderr
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-6, atol=1e-6)


def test_an_adapter_with_a_larger_vocabulary(base: Path, tmp_path: Path) -> None:
    """As Chinese-LLaMA-Alpaca's: the saved embedding and head have more rows."""
    make_adapter(base, tmp_path / "adapter", **ADAPTERS["saved modules"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {
        name: torch.cat([tensor, torch.ones(20, 32)]) if tensor.shape[0] == 130 else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path)
    done = merge(base, tmp_path / "adapter", tmp_path / "merged")
    assert done.status == 0, done.stderr
    merged = open_weights(tmp_path / "merged")
    assert merged.config.vocab_size == 150
    assert torch.equal(merged.read("output_head.weight")[130:], torch.ones(20, 32))


def lacking_half(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    save_file(tensors, path)


def other_kind(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD: dict[str, tuple[Any, str]] = {
    "half of a pair": (lacking_half, r"lacks model\.layers.*lora_B, which target_modules promises"),
    "DoRA": (lambda f: other_kind(f, use_dora=True), "use_dora=True is not supported"),
    "another method": (lambda f: other_kind(f, peft_type="IA3"), "peft_type='IA3' is not supported"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "has neither adapter_model.safetensors",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "does not exist"),
}


@pytest.mark.parametrize("case", BAD)
def test_adapters_that_cannot_be_merged(base: Path, tmp_path: Path, case: str) -> None:
    spoil, complaint = BAD[case]
    make_adapter(base, tmp_path / "adapter", **ADAPTERS["attention"])
    spoil(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=complaint):
        with_adapter(base, tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    make_adapter(base, tmp_path / "adapter", **ADAPTERS["attention"])
    save_hugging_face(tiny_config(hidden_size=64, head_dim=8), tmp_path / "wide")
    done = merge(tmp_path / "wide", tmp_path / "adapter", tmp_path / "x")
    assert done.status == 1
    assert "the adapter is of another model" in done.complaint
    assert not (tmp_path / "x").exists()


def test_growing_to_a_tokenizer(base: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    done = call("asd-ckpt", "convert", "--load", base, "--save", tmp_path / "grown", "--to", "huggingface",
                "--resize-vocab-to", tokenizer_folder)  # fmt: skip
    assert done.status == 0, done.stderr
    assert "vocabulary: 130 -> 400 ids" in done.stderr
    grown, before = (load_file(f / "model.safetensors") for f in (tmp_path / "grown", base))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(grown[name][:130], before[name])
        assert torch.equal(grown[name][130:], before[name].double().mean(0).float().expand(270, -1))
    assert (tmp_path / "grown" / "tokenizer.model").is_file()
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["vocab_size"] == 400
    done = call("asd-ckpt", "convert", "--load", tmp_path / "grown", "--save", tmp_path / "cut", "--to", "ascendspeed",
                "--tensor-model-parallel-size", 2, "--added-token-num", 3)  # fmt: skip
    assert done.status == 0, done.stderr
    assert open_weights(tmp_path / "cut").config.vocab_size == 403


def test_shrinking_to_a_tokenizer(tmp_path: Path, tokenizer_folder: Path) -> None:
    save_hugging_face(tiny_config(vocab_size=500), tmp_path / "hf")
    done = call("asd-ckpt", "convert", "--load", tmp_path / "hf", "--save", tmp_path / "small", "--to", "huggingface",
                "--resize-vocab-to", tokenizer_folder)  # fmt: skip
    assert done.status == 0, done.stderr
    small, before = (load_file(f / "model.safetensors") for f in (tmp_path / "small", tmp_path / "hf"))
    assert torch.equal(small["lm_head.weight"], before["lm_head.weight"][:400])


@pytest.mark.parametrize(
    ("ends", "written"),
    [((2,), [2, 401]), ((450,), 401), ((401, 2), [401, 2]), ((5, 450, 401), 401), ((), 401)],
)
def test_ids_that_begin_and_end_a_text_are_those_of_the_tokenizer(
    tmp_path: Path, tokenizer_folder: Path, ends: tuple[int, ...], written: int | list[int]
) -> None:
    """450 is no id any more, 5 is an ordinary piece, and 401 the tokenizer's end of a text."""
    save_hugging_face(tiny_config(vocab_size=500, bos_token_id=450, eos_token_ids=ends), tmp_path / "hf")
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "added_tokens.json").write_text(
        json.dumps({"<|im_start|>": 400, "<|im_end|>": 401})
    )
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "tokenizer" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<|im_end|>"}))
    done = call("asd-ckpt", "convert", "--load", tmp_path / "hf", "--save", tmp_path / "small", "--to", "hf",
                "--resize-vocab-to", tmp_path / "tokenizer")  # fmt: skip
    assert done.status == 0, done.stderr
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "small" / name).read_text())
        assert (content["bos_token_id"], content["eos_token_id"]) == (1, written)
    assert "bos_token_id: 450 -> 1, by the tokenizer" in done.stderr
    assert ("eos_token_ids" in done.stderr) == (ends != (401, 2))
