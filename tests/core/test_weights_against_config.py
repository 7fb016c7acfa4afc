"""Hugging Face folders whose weights and config contradict each other: transformers' logits, or refused by name."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import open_weights
from ascendspeed_core.weights.huggingface.config import dropout_of, read_model_config
from ascendspeed_core.weights.source import CheckpointError
from ascendspeed_data.errors import AscendSpeedError
from support.tables import ReportTables

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
BLOOM_SIZES = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "seq_length": 32}
CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "bloom": ("BloomConfig", "BloomForCausalLM"),
}
Tensors = dict[str, torch.Tensor]
Contradiction = Callable[[random.Random, dict[str, Any], Tensors], str]
"""Changes a config and tensors at random; returns what an error must name, or "" where there is nothing wrong."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family, with a tied head and without."""
    import transformers

    folder = tmp_path_factory.mktemp("bases")
    for family, (config_name, model_name) in CLASSES.items():
        for tied in (False, True):
            torch.manual_seed(len(family) + tied)
            sizes = BLOOM_SIZES if family == "bloom" else SIZES
            sizes = sizes | ({"head_dim": 8} if family == "qwen3" else {})
            config = getattr(transformers, config_name)(**sizes, tie_word_embeddings=tied)
            model = getattr(transformers, model_name)(config)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, float(parameter.dim() == 1), 0.2)
            model.save_pretrained(folder / f"{family}-{tied}")
    return {path.name: path for path in folder.iterdir()}


def embedding_of(tensors: Tensors) -> str:
    return next(name for name in tensors if name.endswith(("embed_tokens.weight", "word_embeddings.weight")))


def any_of(draw: random.Random, tensors: Tensors, *ends: str) -> str:
    return draw.choice(sorted(name for name in tensors if name.endswith(ends)))


def own_head(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    config["tie_word_embeddings"] = True
    head = tensors.setdefault("lm_head.weight", tensors[embedding_of(tensors)].clone())
    change = draw.choice(["all", "one number", "nothing", "another format"])
    if change == "all":
        head += torch.randn(head.shape)
    elif change == "one number":
        head[draw.randrange(len(head)), draw.randrange(head.shape[1])] += 0.5
    elif change == "another format":
        tensors["lm_head.weight"] = tensors[embedding_of(tensors)].double()
    return ""


def head_only(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    config["tie_word_embeddings"] = True
    tensors["lm_head.weight"] = tensors.pop(embedding_of(tensors)).clone()
    return ""


def no_head(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    config["tie_word_embeddings"] = False
    tensors.pop("lm_head.weight", None)
    return "lm_head.weight.*tie_word_embeddings"


def another_size(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    keys = [key for key in ("vocab_size", "intermediate_size", "hidden_size") if key in config]
    key = draw.choice(keys)
    config[key] += draw.choice([-16, 16, 32])
    return (
        f"{key}={config[key]}" if key != "hidden_size" else "hidden_size=|its config and its weights disagree"
    )


def another_number_of_layers(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    config[key] = draw.choice([1, 3, 5])
    config.pop("layer_types", None)
    if "max_window_layers" in config:
        config["max_window_layers"] = config[key]
    return f"{key}={config[key]}"


def another_number_of_heads(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    if "num_key_value_heads" not in config:
        return own_head(draw, config, tensors)
    config["num_key_value_heads"] = draw.choice([1, 4])
    return f"num_key_value_heads={config['num_key_value_heads']}"


def another_head_size(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    if "head_dim" not in config:
        return own_head(draw, config, tensors)
    config["head_dim"] = draw.choice([4, 16])
    return f"head_dim={config['head_dim']}"


def biases(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    """Tensors that the config leaves out, or that it asks for in vain."""
    name = any_of(draw, tensors, ".weight").removesuffix("weight") + "bias"
    if name in tensors:
        del tensors[name]
        return name
    tensors[name] = torch.randn(8)
    return name


def bias_flag(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    if config["model_type"] not in ("llama", "qwen3"):
        return biases(draw, config, tensors)
    config["attention_bias"] = True
    return "attention_bias=True"


def frequencies(config: dict[str, Any], base: float | None = None) -> torch.Tensor:
    stated = config.get("rope_parameters") or {}
    base = base or stated.get("rope_theta") or config.get("rope_theta") or 10000.0
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found: torch.Tensor = 1.0 / base ** (torch.arange(0, size, 2).float() / size)
    return found


def stored_frequencies(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    if config["model_type"] == "bloom":
        tensors["transformer.rotary_emb.inv_freq"] = torch.ones(4)
        return "inv_freq.*position=alibi"
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    for name in names:
        tensors[name] = frequencies(config).to(dtype)
    change = draw.choice(["nothing", "base", "length", "one"])
    if change == "base":
        tensors[names[1]] = frequencies(config, draw.choice([10300.0, 20000.0, 1e6]) * 1.01).to(dtype)
    elif change == "length":
        tensors[names[1]] = frequencies(config)[:-1]
    elif change == "one":
        tensors[names[0]][-1] *= 1.05
    return "" if change == "nothing" else "inv_freq.*rotary_base"


def masks(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    if config["model_type"] == "mistral":
        config["sliding_window"] = None
    name = "transformer.h.0.attn.bias" if config["model_type"] == "bloom" else "model.layers.0.self_attn.bias"
    mask = torch.ones(1, 1, 8, 8).tril().to(draw.choice([torch.bool, torch.uint8, torch.float32]))
    is_wrong = draw.random() < 0.5
    tensors[name] = mask.flip(-1) if is_wrong else mask
    tensors["model.masked_bias"] = torch.tensor(-1e4)
    tensors["model.position_ids"] = torch.arange(8)[None]
    return "bias.*causal" if is_wrong else ""


def unknown_tensor(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    like = any_of(draw, tensors, ".weight")
    name = f"{like.removesuffix('weight')}{draw.choice(['lora_A', 'gate', 'scale'])}"
    tensors[name] = torch.randn(3)
    return name


def lacking_tensor(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    name = any_of(draw, {n: t for n, t in tensors.items() if "layers" in n or ".h." in n}, ".weight")
    del tensors[name]
    return name


def contradicting_names(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    other = draw.choice(sorted(set(CLASSES) - {config["model_type"]}))
    config[draw.choice(["model_type", "architectures"])] = other
    if isinstance(config["architectures"], str):
        config["architectures"] = [CLASSES[other][1]]
    return "architectures.*model_type"


def named_by_type(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    change = draw.choice([None, []])
    if change is None and draw.random() < 0.5:
        del config["architectures"]
    else:
        config["architectures"] = change
    return ""


def rotary(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    """What transformers 4 and 5 say in different keys, alone or both."""
    if config["model_type"] == "bloom":
        return own_head(draw, config, tensors)
    scaling = {"rope_type": "linear", "factor": draw.choice([2.0, 4.0])}
    change = draw.choice(["two bases", "two scalings", "scaling of 5", "scaling of 4", "base of 4"])
    if change == "two bases":
        config["rope_theta"] = 77.0
        return "rope_theta=77.0 contradicts"
    if change == "two scalings":
        config["rope_scaling"] = scaling
        return "rope_parameters.*rope_scaling.*contradict"
    if change == "scaling of 5":
        config["rope_parameters"] |= scaling
    else:
        del config["rope_parameters"]
        config |= {"rope_theta": 500.0} | ({"rope_scaling": scaling} if change == "scaling of 4" else {})
    return ""


def window(draw: random.Random, config: dict[str, Any], tensors: Tensors) -> str:
    size = draw.choice([3, 5, None])
    if config["model_type"] == "mistral":
        config["sliding_window"] = size
    elif config["model_type"] in ("qwen2", "qwen3"):
        config |= {"use_sliding_window": size is not None, "sliding_window": size, "max_window_layers": 0}
        config["layer_types"] = ["sliding_attention" if size else "full_attention"] * 2
    else:
        return own_head(draw, config, tensors)
    return ""


CONTRADICTIONS: tuple[Contradiction, ...] = (
    own_head, head_only, no_head, another_size, another_number_of_layers, another_number_of_heads, another_head_size,
    biases, bias_flag, stored_frequencies, masks, unknown_tensor, lacking_tensor, contradicting_names, named_by_type,
    rotary, window,
)  # fmt: skip


def write(folder: Path, draw: random.Random, config: dict[str, Any], tensors: Tensors) -> None:
    """One file, or two with an index, which sometimes does not name all that is in them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if draw.random() < 0.6:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    if draw.random() < 0.5:
        del index[draw.choice(sorted(index))]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@torch.no_grad()
def difference(folder: Path) -> float:
    """Our logits and transformers', both fp32: the largest difference."""
    from transformers import AutoModelForCausalLM

    source = open_weights(folder)
    tokens = torch.randint(0, source.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(3))
    ours = load_model(source, ParallelMesh(Device("cpu"), Layout()), torch.float32)(ModelInput(tokens)).logits
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    return float((ours - theirs).abs().max())


def try_contradictions(bases: dict[str, Path], folder: Path, seed: int, count: int) -> tuple[int, int, float]:
    """Return how many were refused and how many read, and the largest difference of these from transformers."""
    draw, refused, largest = random.Random(seed), 0, 0.0
    for number in range(count):
        contradict = CONTRADICTIONS[number % len(CONTRADICTIONS)]
        base = bases[draw.choice(sorted(bases))]
        config = json.loads((base / "config.json").read_text())
        tensors = load_file(base / "model.safetensors")
        complaint = contradict(draw, config, tensors)
        case = folder / f"{number}-{contradict.__name__}-{base.name}"
        write(case, draw, config, tensors)
        if complaint:
            with pytest.raises(AscendSpeedError, match=complaint) as raised:
                open_weights(case)
            assert "\n" not in str(raised.value)
            refused += 1
        else:
            far = difference(case)
            # fp32: the same sums in the order of two libraries.
            assert far < 5e-5, (case.name, far)
            largest = max(largest, far)
    return refused, count - refused, largest


def report_of(report: ReportTables, seed: int, found: tuple[int, int, float]) -> None:
    header = ("seed", "refused by name", "read", "largest difference", "disagreements")
    report.add("Weights that contradict their config, against transformers", header, seed, *found, 0)


def test_each_contradiction_is_refused_by_name_or_read_as_transformers_does(
    bases: dict[str, Path], tmp_path: Path, report: ReportTables
) -> None:
    report_of(report, 17, try_contradictions(bases, tmp_path, 17, 85))


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(8))
def test_many_contradictions(bases: dict[str, Path], tmp_path: Path, report: ReportTables, seed: int) -> None:
    report_of(report, seed, try_contradictions(bases, tmp_path, seed, 170))


def test_what_is_left_out_is_said(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama-True"]
    tensors = load_file(base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies(config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    left = [str(one) for one in open_weights(tmp_path).left_out()]
    assert left == [
        "lm_head.weight (equal to model.embed_tokens.weight, which the config ties to it)",
        "model.layers.0.self_attn.rotary_emb.inv_freq and 1 more "
        "(equal to the frequencies of rotary_base=10000 and 4 pairs)",
    ]


def test_several_files_of_weights_are_read_as_transformers_does(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bases["llama-False"]
    tensors = load_file(base / "model.safetensors")
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, tmp_path / "pytorch_model.bin")
    assert difference(tmp_path) < 5e-5
    assert "read are model.safetensors; not read: pytorch_model.bin" in capsys.readouterr().err
    names = sorted(tensors)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    for number, part in enumerate((names[:5], names[5:]), 1):
        save_file(
            {name: tensors[name] for name in part}, tmp_path / f"model-0000{number}-of-00002.safetensors"
        )
    assert open_weights(tmp_path).tensors() == open_weights(base).tensors()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not all parts of one model"):
        open_weights(tmp_path)


def test_two_files_with_different_tensors_of_one_name(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama-False"]
    tensors = load_file(base / "model.safetensors")
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = dict.fromkeys(tensors, files[0])
    index["model.norm.weight"] = files[1]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    save_file(tensors, tmp_path / files[0])
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / files[1])
    assert open_weights(tmp_path).tensors() == open_weights(base).tensors()
    save_file({"model.norm.weight": tensors["model.norm.weight"] + 1}, tmp_path / files[1])
    with pytest.raises(CheckpointError, match=r"hold different tensors model\.norm\.weight"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_hidden_layers": 2.0}, "num_hidden_layers=2.0: input should be a valid integer; correct it"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': input should be a valid number; correct it"),
        ({"intermediate_size": 0}, "intermediate_size=0: input should be greater"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not a number of 1 to"),
        ({"hidden_size": None}, "hidden_size is null, and has no default; add it"),
        ({"rope_theta": "x", "rope_parameters": None}, "rope_theta='x': input should be a valid number"),
        ({"eos_token_id": [1, "x"]}, r"eos_token_id\[1\]='x': input should be"),
        (
            {"rope_scaling": {"type": "linear"}, "rope_parameters": None},
            "rope_scaling: factor=None: input should be",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None},
            "rope scaling 'dynamic' is not supported; .* changes nothing up to max_position_embeddings: .* leave out",
        ),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}, "rope_parameters": None},
            "rope scaling 'longrope' is not supported; .* only if the weights were trained without it, or use another",
        ),
        (
            {"rope_scaling": {"factor": 2.0}, "rope_parameters": None},
            "says {'factor': 2.0}, but no rope_type; add it",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "says {'full_attention': .*}, but no rope_type",
        ),
        ({"attention_dropout": 1.5}, "attention_dropout=1.5 is no number from 0 to below 1"),
        ({"attention_dropout": "0"}, "attention_dropout='0' is no number from 0 to below 1"),
    ],
)
def test_a_message_names_the_file_and_its_own_key(
    bases: dict[str, Path], tmp_path: Path, change: dict[str, Any], complaint: str
) -> None:
    content = json.loads((bases["llama-False"] / "config.json").read_text()) | change
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(AscendSpeedError, match=f"^{path}: .*{complaint}") as raised:
        read_model_config(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "bloom"])
def test_dropout_of_a_config_is_named_and_changes_no_logits(
    bases: dict[str, Path], tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("attention_dropout", "hidden_dropout") if family == "bloom" else ("attention_dropout",)
    base, there = bases[f"{family}-False"], tmp_path / "there"
    shutil.copytree(base, there)
    content = json.loads((base / "config.json").read_text()) | dict.fromkeys(keys, 0.1)
    (there / "config.json").write_text(json.dumps(content))
    capsys.readouterr()
    source = open_weights(there)
    lines = [line for line in capsys.readouterr().err.splitlines() if "dropout" in line]
    assert len(lines) == 1
    assert all(f"{key}=0.1" in lines[0] for key in keys)
    assert source.config == open_weights(base).config
    assert dropout_of(there / "config.json") == dict.fromkeys(keys, 0.1)
