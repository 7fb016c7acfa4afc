"""What configs say and may not say, published sizes, and `asd-core models`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_ckpt.writers.huggingface import write_hugging_face
from ascendspeed_core.models.families import FAMILIES, family_of_hugging_face, find_family
from ascendspeed_core.weights import open_weights
from ascendspeed_data.errors import AscendSpeedError
from support.commands import call, run_command
from support.families import rotary_of
from support.models import save_hugging_face, tiny_config

# Parameters as the makers state them: the totals of the published checkpoint files.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "qwen2-0.5b": 494_032_768,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120,
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
    "bloom-560m": 559_214_592,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "internlm2-7b": 7_737_708_544,
    "internlm3-8b": 8_804_241_408,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "phi3-mini-4k": 3_821_079_552,
    "phi4": 14_659_507_200,
    "olmo2-1b": 1_484_916_736,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmo3-7b": 7_298_011_136,
    "glm4-9b-0414": 9_400_279_040,
    "granite3.1-2b": 2_533_531_648,
    "granite3.1-8b": 8_170_848_256,
    "smollm3-3b": 3_075_098_624,
    "minicpm-2b": 2_724_880_896,
    "command-r-v01": 34_980_831_232,
    "command-r-plus": 103_810_674_688,
    "stablelm-3b": 2_795_443_200,
    "stablelm2-1.6b": 1_644_515_328,
}


def hf_config(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of the family's first published size, changed."""
    table = find_family(family)
    hf = table.write_config(table.read_config(next(iter(table.sizes.values()))))
    return {key: value for key, value in (hf | changes).items() if value != "absent"}


def read(hf: dict[str, Any]) -> Any:
    return family_of_hugging_face(hf, "config.json").read_config(hf)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_parameters(name: str) -> None:
    family = next(family for family in FAMILIES.values() if name in family.sizes)
    assert family.read_config(family.sizes[name]).num_parameters == PUBLISHED[name]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_published_configs_survive_the_round_trip(family: Any) -> None:
    for hf in family.sizes.values():
        config = family.read_config(hf)
        assert read(family.write_config(config)) == config


def test_transformers_reads_the_published_sizes_as_we_do() -> None:
    """Head sizes, key-value heads, scaling and ends, where transformers has the family."""
    from transformers import CONFIG_MAPPING

    for name in ("llama", "mistral", "qwen2", "qwen3", "bloom"):
        family = FAMILIES[name]
        for hf in family.sizes.values():
            config = family.read_config(hf)
            theirs: Any = CONFIG_MAPPING[family.model_type](**family.write_config(config))
            assert theirs.hidden_size == config.hidden_size
            assert theirs.num_hidden_layers == config.num_layers
            assert theirs.num_attention_heads == config.num_attention_heads
            assert (
                getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
                == config.num_key_value_heads
            )
            assert (getattr(theirs, "sliding_window", None) or None) == config.sliding_window
            if config.position == "rotary":
                assert rotary_of(theirs)["rope_theta"] == config.rotary_base
                kind = config.rotary_scaling.kind if config.rotary_scaling else "default"
                assert rotary_of(theirs)["rope_type"] == kind


@pytest.mark.parametrize(
    ("hf", "complaint"),
    [
        (hf_config("llama", architectures=["BertModel"]), r"architectures=\['BertModel'\] is not supported"),
        (hf_config("llama", hidden_act="gelu"), "hidden_act='gelu' is not supported for llama; only 'silu' is"),
        (hf_config("llama", rope_scaling={"type": "dynamic", "factor": 2.0}), "rope scaling 'dynamic' is not"),
        (
            hf_config("llama", rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            "yarn lacks original_max_position_embeddings",
        ),
        (
            hf_config("llama", rope_scaling={"rope_type": "linear", "factor": 4.0, "mscale": 0.7}),
            r"rope scaling 'linear' with \{'mscale': 0.7\} is not supported",
        ),
        (hf_config("llama", hidden_size=None), "hidden_size is null, and has no default; add it"),
        (hf_config("llama", num_key_value_heads=3), "num_key_value_heads=3"),
        (
            hf_config("qwen2", use_sliding_window=True, sliding_window=64, layer_types=["full_attention"]),
            "layer_types must name sliding_attention or full_attention for each of num_hidden_layers=24",
        ),
        (hf_config("bloom", n_inner=77), "n_inner=77 is not four times"),
        (
            hf_config("bloom", apply_residual_connection_post_layernorm=True),
            "apply_residual_connection_post_layernorm=True is not supported",
        ),
        (hf_config("baichuan", z_loss_weight=0.1), "z_loss_weight=0.1 is not supported"),
        (
            hf_config("baichuan", architectures=["BaichuanForCausalLM"], max_position_embeddings="absent"),
            "model_max_length=None is not a number",
        ),
        (hf_config("internlm", rotary={"base": 10000, "type": "linear"}), "rotary=.* is not supported"),
        (
            hf_config("phi3", rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}),
            "rope scaling 'longrope' is not supported; there are default, linear, llama3, yarn; it changes the model",
        ),
        (
            hf_config("phi3", rope_scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}),
            "rope scaling 'yarn' stands for longrope in this family",
        ),
        (
            hf_config("glm4", partial_rotary_factor=0.5, rope_parameters={"partial_rotary_factor": 0.25}),
            "partial_rotary_factor=0.5 and 0.25 in rope_parameters contradict each other",
        ),
        (hf_config("glm4", partial_rotary_factor=2), "partial_rotary_factor=2 is no number above 0 up to 1"),
        (hf_config("gemma2", layer_types=["full_attention"]), "for each of num_hidden_layers=26 layers, and names 1"),
        (hf_config("gemma3", layer_types="absent", sliding_window_pattern=0), "sliding_window_pattern=0 is not"),
        (hf_config("gemma3", use_bidirectional_attention=True), "use_bidirectional_attention=True is not supported"),
        (hf_config("gemma3", final_logit_softcapping=30.0), "final_logit_softcapping=30.0 is not supported"),
        (hf_config("gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar=0 is no number above zero"),
        (
            hf_config("olmo3", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            "a rope_type of sliding_attention but default is not supported",
        ),
        (hf_config("olmo3", rope_theta=10000.0), "rope_parameters=.* contradicts {'rope_theta': 10000.0.* beside it"),
        (hf_config("smollm3", use_sliding_window=True), "use_sliding_window=true is not supported for smollm3"),
        (hf_config("smollm3", no_rope_layers=[1, 2]), "no_rope_layers must have a 0 or 1 for each of"),
        (hf_config("cohere2", rotary_pct=0.5), "rotary_pct=0.5 is not supported for cohere2; only 1.0 is"),
        (hf_config("minicpm", num_experts=8), "num_experts=8 is not supported for minicpm; only 0 is"),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
            r"architectures=\['Gemma3ForConditionalGeneration'\] is not supported",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_config_may_not_ask_for(hf: dict[str, Any], complaint: str) -> None:
    with pytest.raises(AscendSpeedError, match=complaint):
        read(hf)


def test_a_config_that_a_family_cannot_say_is_not_written() -> None:
    config = tiny_config(qk_norm=True, norm="layernorm")
    with pytest.raises(AscendSpeedError, match="llama cannot say norm='layernorm', qk_norm=True"):
        find_family("llama").write_config(config)


def test_the_kinds_of_baichuan_are_told_apart() -> None:
    sizes = FAMILIES["baichuan"].sizes
    kinds = {name: (c.position, c.normalised_head) for name in sizes for c in [read(dict(sizes[name]))]}
    assert kinds == {
        "baichuan-7b": ("rotary", False),
        "baichuan-13b": ("alibi", False),
        "baichuan2-7b": ("rotary", True),
        "baichuan2-13b": ("alibi", True),
    }


def test_code_that_a_config_names_is_never_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder whose modelling code would leave a trace; one line says that it is not followed."""
    save_hugging_face(tiny_config(), tmp_path)
    trace = tmp_path / "was-run"
    (tmp_path / "modeling_evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    path = tmp_path / "config.json"
    hf = json.loads(path.read_text()) | {
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.LlamaForCausalLM"},
        "trust_remote_code": True,
    }
    path.write_text(json.dumps(hf))
    monkeypatch.chdir(tmp_path)
    source = open_weights(tmp_path)
    assert all(isinstance(source.read(name), torch.Tensor) for name in source.tensors())
    lines = [line for line in capsys.readouterr().err.splitlines() if "not followed" in line]
    assert lines == [
        f"{path}: auto_map and trust_remote_code not followed, no code of a model is run; read as llama"
    ]
    assert not trace.exists()


def test_a_key_that_means_nothing_to_us_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    read(hf_config("llama", logit_softcap=30.0, torch_dtype="float16"))
    assert capsys.readouterr().err.splitlines() == [
        "config.json: llama knows no logit_softcap; not used, so check that the model does not depend on it"
    ]


def test_published_configs_are_read_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    for family in FAMILIES.values():
        for hf in family.sizes.values():
            family.read_config(family.write_config(family.read_config(hf)))
    assert capsys.readouterr().err == ""


def test_ids_that_end_a_generation_come_from_the_generation_config(tmp_path: Path) -> None:
    """Llama 3 Instruct: config.json names one end, generation_config.json the three that chats end with."""
    save_hugging_face(tiny_config(), tmp_path)
    ends = {"bos_token_id": 1, "eos_token_id": [2, 8, 9]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    source = open_weights(tmp_path)
    assert source.config.eos_token_ids == (2, 8, 9)
    out = tmp_path / "out"
    out.mkdir()
    write_hugging_face(source, out, None, 1 << 30)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 8, 9]
    assert open_weights(out).config == source.config


def test_models_are_listed() -> None:
    done = run_command("asd-core", "models", "--json")
    assert done.status == 0, done.stderr
    rows = {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert set(PUBLISHED) <= rows.keys()
    assert rows["llama2-70b"]["training_bytes"] == 18 * PUBLISHED["llama2-70b"]
    assert rows["llama2-70b"]["cache_bytes_per_token"] == 2 * 2 * 80 * 8 * 128
    listed = call("asd-core", "models", "bloom", "qwen3-8b").stdout.splitlines()
    assert [line.split()[1] for line in listed[1:5]] == ["qwen3-8b", "bloom-560m", "bloom-7b1", "bloom-176b"]


def test_the_config_of_a_size_is_one_to_train_from(tmp_path: Path) -> None:
    done = call("asd-core", "models", "bloom-7b1", "--config")
    hf = json.loads(done.stdout)
    assert read(hf).num_parameters == PUBLISHED["bloom-7b1"]
    wrong = call("asd-core", "models", "bloom", "--config")
    assert wrong.status == 2
    assert wrong.complaint.endswith("--config prints one model, 3 were chosen; name one size")
    unknown = call("asd-core", "models", "blom")
    assert unknown.status == 2
    assert "did you mean bloom?" in unknown.complaint
