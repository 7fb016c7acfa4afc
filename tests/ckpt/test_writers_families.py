"""Every family through every format that can hold it, and what cannot be held is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ascendspeed_ckpt.writers.supported import check_supported
from ascendspeed_core.models.families import known_families
from ascendspeed_core.weights import open_weights
from ascendspeed_core.weights.source import CheckpointError
from ckpt.test_writers import NAMES, digests, external, to
from support.families import REFERENCES

REFUSED = {
    "Llama 3.2": {"ascendspeed": "rope scaling", "megatron": "rope scaling but Llama 3's"},
    "LLaMA with all biases": {"ascendspeed": "LLaMA with biases in the MLP"},
    "Mistral": {"ascendspeed": "sliding window"},
    "Qwen 2": {"ascendspeed": "bias on queries, keys and values without one on the output"},
    "Qwen 2.5 with YaRN": {"ascendspeed": "rope scaling", "megatron": "rope scaling but Llama 3's"},
    "Qwen 3": {"ascendspeed": "norms of queries and keys"},
    "InternLM": {"megatron": "bias on attention's output without one in the MLP"},
    "Baichuan 13B": {"megatron": "ALiBi"},
    "Baichuan 2 7B": {"ascendspeed": "normalised head", "megatron": "normalised head"},
    "Baichuan 2 13B": {"ascendspeed": "normalised head", "megatron": "ALiBi"},
    "Bloom": {"megatron": "ALiBi and no norm behind the embedding"},
}
"""What the program of a format would not compute. Llama 3's own scaling begins at 8,192 positions, here at 16."""

LAYOUTS: tuple[dict[str, int], ...] = ({}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"tp": 4})
"""Three layers: two stages are uneven."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, reference in REFERENCES.items():
        made[name] = tmp_path_factory.mktemp("family") / "hf"
        reference.save(made[name])
    return made


def there_and_back(hf: Path, folder: Path, name: str, family: str, layout: dict[str, int]) -> None:
    config = open_weights(hf).config
    target = external(name, config, **layout)
    native = to(hf, folder / "native", "native")
    refusal = REFUSED.get(family, {}).get("ascendspeed" if target.kind == "ascendspeed" else "megatron")
    if refusal is not None:
        with pytest.raises(CheckpointError, match=f"has no .*{refusal}"):
            to(native, folder / "there", target.kind, target)
        return
    there = to(native, folder / "there", target.kind, target)
    back = to(there, folder / "back", "huggingface")
    assert digests(back) == digests(hf)
    assert open_weights(back).config == config


@pytest.mark.parametrize("family", REFERENCES)
@pytest.mark.parametrize("name", ["ascendspeed", "megatron", "torch_dist"])
def test_there_and_back(folders: dict[str, Path], tmp_path: Path, family: str, name: str) -> None:
    there_and_back(folders[family], tmp_path, name, family, {"tp": 2, "pp": 2})


@pytest.mark.parametrize(
    ("size", "lacks"),
    [
        ("internlm2-7b", None),
        ("phi4", None),
        ("gemma2-2b", "windows in some layers and no scale of attention's scores and no soft-capped scores"),
        ("gemma3-1b", "rotary base of layers with a window"),
        ("olmo2-1b", "norms of queries and keys but one for all heads and no norms after attention and MLP"),
        ("glm4-9b-chat", "rotary positions in a part of each head and no interleaved rotary positions"),
        ("granite3.1-2b", "embedding multiplier and no residual multiplier and no logits multiplier"),
        ("smollm3-3b", "rotary positions in some layers"),
        (
            "command-r-v01",
            "LayerNorm without bias and no attention and MLP side by side and no logits multiplier",
        ),
        ("minitron-4b", "norms that multiply by 1 \\+ weight and no relu2 MLP"),
    ],
)
def test_options_that_megatron_does_not_compute_are_named(size: str, lacks: str | None) -> None:
    family = next(family for family in known_families().values() if size in family.sizes)
    config = family.read_config(family.sizes[size])
    if lacks is None:
        check_supported("megatron", config)
        return
    with pytest.raises(CheckpointError, match=f"has no .*{lacks}"):
        check_supported("megatron", config)


@pytest.mark.nightly
@pytest.mark.parametrize("family", REFERENCES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_there_and_back_under_every_layout(
    folders: dict[str, Path], tmp_path: Path, family: str, name: str, layout: dict[str, int]
) -> None:
    there_and_back(folders[family], tmp_path, name, family, layout)


def test_blooms_files_are_those_of_2023(folders: dict[str, Path], tmp_path: Path) -> None:
    """Nested dictionaries; the packed projection of Hugging Face's Bloom, cut by rows, as it stands."""
    config = open_weights(folders["Bloom"]).config
    there = to(
        folders["Bloom"], tmp_path / "there", "ascendspeed", external("ascendspeed", config, tp=2, pp=2)
    )
    want = load_file(folders["Bloom"] / "model.safetensors")
    files: dict[tuple[int, int], Any] = {
        (rank, stage): torch.load(
            there / f"release/mp_rank_{rank:02d}_{stage:03d}/model_optim_rng.pt", weights_only=False
        )["model"]
        for rank in range(2)
        for stage in range(2)
    }
    first, last = ([files[rank, stage]["language_model"] for rank in range(2)] for stage in range(2))
    assert set(files[0, 0]) == {"language_model"}
    assert set(files[0, 1]) == {"language_model", "word_embeddings_for_head"}
    assert set(first[0]["embedding"]["word_embeddings"]) == {"weight", "norm.weight", "norm.bias"}
    rows = torch.cat([rank["embedding"]["word_embeddings"]["weight"] for rank in first])
    head = torch.cat([files[rank, 1]["word_embeddings_for_head"]["weight"] for rank in range(2)])
    assert rows.shape[0] == 256
    assert torch.equal(rows[:125], want["transformer.word_embeddings.weight"])
    assert torch.equal(head, rows)
    for kind in ("weight", "bias"):
        name = f"self_attention.query_key_value.{kind}"
        for layer, (place, states) in enumerate(((0, first), (1, first), (0, last))):
            joined = torch.cat([rank["encoder"][f"layers.{place}.{name}"] for rank in states])
            assert torch.equal(joined, want[f"transformer.h.{layer}.{name}"])
    dense = torch.cat([rank["encoder"]["layers.0.mlp.dense_4h_to_h.weight"] for rank in last], 1)
    assert torch.equal(dense, want["transformer.h.2.mlp.dense_4h_to_h.weight"])
    assert torch.equal(last[0]["encoder"]["final_layernorm.bias"], want["transformer.ln_f.bias"])


@pytest.mark.parametrize("short", [False, True], ids=["named", "bare"])
def test_blooms_deepspeed_pipe_is_read(folders: dict[str, Path], tmp_path: Path, short: bool) -> None:
    """Written here from what is known of it: one file for each layer and rank, numbered by pseudo layers."""
    hf = folders["Bloom"]
    want = load_file(hf / "model.safetensors")
    folder = tmp_path / "pipe" / "global_step7"
    folder.mkdir(parents=True)
    (tmp_path / "pipe" / "latest").write_text("global_step7\n")
    (folder / "config.json").write_bytes((hf / "config.json").read_bytes())
    columns = ("self_attention.dense.weight", "mlp.dense_4h_to_h.weight")
    whole = ("layernorm.weight", "layernorm.bias", "dense.bias", "4h_to_h.bias")
    embedding = torch.nn.functional.pad(want["transformer.word_embeddings.weight"], (0, 0, 0, 3))
    for rank in range(2):
        norm = {
            f"word_embeddings.norm.{k}": want[f"transformer.word_embeddings_layernorm.{k}"]
            for k in ("weight", "bias")
        }
        states: dict[int, dict[str, torch.Tensor]] = {
            1: {"word_embeddings.weight": embedding.chunk(2)[rank].clone(), **norm}
        }
        for layer in range(3):
            prefix = f"transformer.h.{layer}."
            states[3 + layer] = {
                name: tensor if name.endswith(whole) else tensor.chunk(2, int(name in columns))[rank].clone()
                for key, tensor in want.items()
                if key.startswith(prefix) and (name := key.removeprefix(prefix))
            }
        prefix = "" if short else "final_layernorm."
        states[7] = {f"{prefix}{k}": want[f"transformer.ln_f.{k}"] for k in ("weight", "bias")}
        for number, state in states.items():
            torch.save(state, folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    assert open_weights(tmp_path / "pipe").kind == "deepspeed"
    assert digests(to(tmp_path / "pipe", tmp_path / "back", "huggingface")) == digests(hf)
    (folder / "layer_04-model_01-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"lacks layer_04-model_01-model_states\.pt"):
        open_weights(tmp_path / "pipe")


def test_names_of_december_2023_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """Megatron's names for LLaMA, where `dense_h_to_4h` is the up projection."""
    hf = folders["LLaMA 2 70B"]
    config = open_weights(hf).config
    there = to(hf, tmp_path / "there", "ascendspeed", external("ascendspeed", config, tp=2))
    (there / "release" / "ascendspeed.json").unlink()
    (there / "release" / "config.json").write_bytes((hf / "config.json").read_bytes())
    for path in there.glob("release/mp_rank_*/*.pt"):
        content = torch.load(path, weights_only=False)
        old, encoder = content["model"], {}
        for key, tensor in old.items():
            if key.startswith("language_model.") and "inv_freq" not in key:
                name = key.removeprefix("language_model.").replace(".attention.", ".self_attention.")
                name = name.replace("mlp.up_proj", "mlp.dense_h_to_4h").replace(
                    "mlp.down_proj", "mlp.dense_4h_to_h"
                )
                encoder[name] = tensor
        content["model"] = {
            "language_model": {
                "embedding": {"word_embeddings": {"weight": old["embedding.word_embeddings.weight"]}},
                "encoder": encoder,
                "output_layer": {"weight": old["lm_head.lm_head.weight"]},
            }
        }
        del content["ascendspeed"]
        torch.save(content, path)
    assert digests(to(there, tmp_path / "back", "huggingface")) == digests(hf)
