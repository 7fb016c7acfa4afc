"""Checkpoints of other programs as they lie on disk: DeepSpeed's files of 2023, and files without usable arguments."""

import io
import json
import random
import shutil
import sys
import types
from argparse import Namespace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ascendspeed_ckpt import Conversion, WritePlan, convert
from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import WeightSource, open_weights
from ascendspeed_core.weights.huggingface.config import read_model_config
from ascendspeed_core.weights.shard_layout import shard_layout
from ascendspeed_core.weights.source import CheckpointError, UnknownModelError
from support.commands import call
from support.converters_2023 import write_bloom_deepspeed, write_llama
from support.families import REFERENCES, logits_of
from support.models import save_hugging_face, tiny_config
from support.tables import ReportTables

TITLE = "Folders of other programs against transformers"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Hugging Face folders and transformers' models."""
    folder = tmp_path_factory.mktemp("models")
    names = ("LLaMA", "LLaMA 2 70B", "InternLM", "Bloom")
    return {name: (folder / name, REFERENCES[name].save(folder / name)) for name in names}


def logits(source: WeightSource, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model = load_model(source, ParallelMesh(Device("cpu"), Layout()), torch.float32)
        found: torch.Tensor = model(ModelInput(tokens)).logits
    return found


def assert_same(source: WeightSource, folder: Path, model: Any) -> float:
    """Every tensor is that of the unsharded model, and its logits are transformers' own."""
    want = open_weights(folder)
    assert source.tensors() == want.tensors()
    assert all(torch.equal(source.read(name), want.read(name)) for name in want.tensors())
    tokens = torch.randint(0, 125, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        far = float((logits(source, tokens) - logits_of(model, tokens)).abs().max())
    # fp32: the same sums in the order of two libraries.
    assert far < 5e-5
    return far


LAYOUTS = [(name, tp, pp) for name in ("LLaMA", "InternLM", "Bloom") for tp, pp in ((1, 1), (2, 1), (4, 1))]
LAYOUTS += [("Bloom", 1, 3), ("Bloom", 2, 2), ("Bloom", 3, 3)]


@pytest.mark.parametrize(("name", "tp", "pp"), LAYOUTS)
def test_deepspeeds_files_of_2023_are_read(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, report: ReportTables, name: str, tp: int, pp: int
) -> None:
    folder, model = models[name]
    weights = load_file(folder / "model.safetensors")
    if name == "Bloom":
        written = write_bloom_deepspeed(tmp_path / "ds", weights, 3, tp, pp)
    else:
        written = write_llama(tmp_path / "ds", weights, 8, 3, tp, deepspeed=True)
    config = read_model_config(folder / "config.json")
    far = [
        assert_same(open_weights(path, config=config), folder, model)
        for path in (written, written / "release")
    ]
    report.add(TITLE, ("what", "layout", "logits"), f"{name}, DeepSpeed", f"tp{tp} pp{pp}", max(far))
    with pytest.raises(UnknownModelError, match=r"does not include its architecture.*--model-config"):
        open_weights(written)
    first = min((written / "release").glob("*.pt"))
    if tp * pp > 1:
        first.unlink()
        with pytest.raises(CheckpointError, match=r"lacks mp_rank_00_model_states\.pt"):
            open_weights(written, config=config)


def strange() -> Any:
    """Arguments that name a module that readers do not have."""
    module: Any = types.ModuleType("someones_own_code")
    kind: Any = type(
        "Settings", (), {"__module__": "someones_own_code", "make": classmethod(lambda kind, _: kind())}
    )
    module.Settings = kind
    sys.modules["someones_own_code"] = module
    return kind()


def made_by_a_method() -> Any:
    """Arguments that are pickled as the call of a method."""
    found = strange()
    type(found).__reduce__ = lambda self: (type(self).make, (7,))
    return found


ARGUMENTS = {
    "none": None,
    "an unknown object": strange,
    "what a method made": made_by_a_method,
    "a path": lambda: PurePosixPath("/data"),
    "other arguments": lambda: Namespace(lr=1e-3),
}


@pytest.mark.parametrize("case", ARGUMENTS)
@pytest.mark.parametrize("name", ["LLaMA", "LLaMA 2 70B"])
def test_a_folder_without_usable_arguments_is_read_with_a_config(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, report: ReportTables, name: str, case: str
) -> None:
    folder, model = models[name]
    make = ARGUMENTS[case]
    more = {} if make is None else {"args": make()}
    written = write_llama(tmp_path / "there", load_file(folder / "model.safetensors"), 8, 3, 2, 3, **more)
    sys.modules.pop("someones_own_code", None)
    config = read_model_config(folder / "config.json")
    far = assert_same(open_weights(written, config=config), folder, model)
    report.add(TITLE, ("what", "layout", "logits"), f"{name}, args: {case}", "tp2 pp3", far)
    with pytest.raises(UnknownModelError, match="--model-config"):
        open_weights(written)
    shown = call("asd-ckpt", "inspect", written)
    assert shown.status == 0
    assert "model: not known" in shown.stdout
    assert "model.language_model.layers.0.mlp.down_proj.weight" in shown.stdout
    facts = json.loads(call("asd-ckpt", "inspect", written, "--json").stdout)
    assert facts["model"] is None
    assert len(facts["files"]) == 6


def test_every_command_takes_such_a_folder(tmp_path: Path, tokenizer_folder: Path, dataset: Path) -> None:
    folder = tmp_path / "hf"
    save_hugging_face(tiny_config(vocab_size=401), folder)
    weights = load_file(folder / "model.safetensors")
    written = write_llama(tmp_path / "there", weights, 8, 4, 2, deepspeed=True)
    config = folder / "config.json"
    (tmp_path / "ids.jsonl").write_text("[1, 5, 9, 77]\n")
    flags = (
        "--device", "cpu", "--prompt-format", "jsonl", "--prompt-file", tmp_path / "ids.jsonl", "--max-new-tokens", 6,
        "--ignore-eos", "--json", "--tokenizer-name-or-path", tokenizer_folder,
    )  # fmt: skip
    want = call("asd-infer", "generate", "--load", folder, *flags)
    found = call("asd-infer", "generate", "--load", written, "--model-config", config, *flags)
    assert (found.status, found.stdout) == (0, want.stdout), found.stderr
    plan = call(
        "asd-core", "pretrain", "--device", "cpu", "--load", written, "--model-config", config, "--data-path", dataset,
        "--split", "100,0,0", "--seq-length", 16, "--train-iters", 1, "--dry-run",
    )  # fmt: skip
    assert plan.status == 0, plan.stderr
    lacking = call("asd-infer", "generate", "--load", written, *flags)
    assert lacking.status == 1
    assert "--model-config" in lacking.complaint
    twice = call("asd-infer", "generate", "--load", folder, "--model-config", config, *flags)
    assert twice.status != 0
    assert "leave --model-config out" in twice.complaint
    done = call(
        "asd-ckpt", "convert", "--load", written, "--model-config", config, "--save", tmp_path / "back"
    )
    assert done.status == 0, done.stderr
    assert "left out of the input: rotary_emb.inv_freq" in done.stdout
    assert "left out of the input: rows 401 to 415 of embedding and head (padding)" in done.stdout


def test_shares_of_zero_3_are_named(models: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    step = tmp_path / "run" / "global_step4"
    step.mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("global_step4")
    torch.save({"module": {"a": torch.zeros(0)}}, step / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    config = read_model_config(models["LLaMA"][0] / "config.json")
    with pytest.raises(CheckpointError, match=r"shares of ZeRO-3.*zero_to_fp32"):
        open_weights(tmp_path / "run", config=config)


CONTRADICTIONS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_key_value_heads", "rotary_base", "tie",
    "vocab_size",
)  # fmt: skip


@pytest.mark.parametrize("without_arguments", [False, True], ids=["arguments", "no arguments"])
@pytest.mark.parametrize("kind", ["ascendspeed", "megatron", "torch_dist"])
def test_a_config_that_contradicts_the_files_is_refused(
    models: dict[str, tuple[Path, Any]],
    tmp_path: Path,
    report: ReportTables,
    kind: Any,
    without_arguments: bool,
) -> None:
    """Drawn: the files say what they are made of, or a line names what does not fit."""
    folder, _ = models["LLaMA 2 70B"]
    source = open_weights(folder)
    plan = WritePlan(kind, shard_layout(3, tp=2, pp=1 if kind == "torch_dist" else 3))
    convert(Conversion(source, tmp_path / "there", kind, write_plan=plan, verify_logits=False, workers=1))
    (tmp_path / "there/release/ascendspeed.json").unlink()
    for path in (tmp_path / "there").rglob("*.pt") if without_arguments else ():
        content = torch.load(path, weights_only=False)
        content.pop("args", None)
        torch.save(content, path)
    draw, wrong = random.Random(kind), 0
    changes: dict[str, Any] = {
        "num_layers": {"num_layers": draw.choice([1, 2, 4])},
        "hidden_size": {"hidden_size": 40},
        "ffn_hidden_size": {"ffn_hidden_size": draw.choice([40, 56])},
        "num_attention_heads": {"num_attention_heads": 4},
        "num_key_value_heads": {"num_key_value_heads": draw.choice([2, 8])},
        "rotary_base": {"rotary_base": draw.uniform(11000, 30000)},
        "tie": {"tie_word_embeddings": True},
        "vocab_size": {"vocab_size": 400},
    }
    for name in CONTRADICTIONS:
        config = source.config.model_copy(update=changes[name])
        try:
            opened = open_weights(tmp_path / "there", config=config)
        except CheckpointError as error:
            assert str(tmp_path) in str(error)
            assert "\n" not in str(error)
        else:
            # Not every format stores rotary frequencies; then the config decides, and arguments are compared by a line.
            wrong += name != "rotary_base" or kind == "ascendspeed"
            assert opened.config == config
    report.add(
        "Configs that contradict files of other programs",
        ("kind", "tried", "believed"),
        kind,
        len(CONTRADICTIONS),
        wrong,
    )
    assert wrong == 0


def test_what_stands_between_the_weights_is_named(
    models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = models["LLaMA"]
    written = write_llama(tmp_path / "there", load_file(folder / "model.safetensors"), 8, 3)
    config = read_model_config(folder / "config.json")
    path = written / "release" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path)
    name = "language_model.layers.0.attention"
    content["model"] |= {
        f"{name}._extra_state": io.BytesIO(b"x"),
        f"{name}.steps": 7,
        f"{name}.nothing": None,
    }
    content["model"][f"{name}.attn.bias"] = torch.ones(1, 1, 6, 6).tril()
    torch.save(content, path)
    left = {str(one) for one in open_weights(written, config=config).left_out()}
    assert f"{name}._extra_state (Transformer Engine's history of fp8 scales, not a weight)" in left
    assert f"{name}.steps (7, which is no tensor)" in left
    assert f"{name}.attn.bias (the causal mask, which is computed)" in left
    for wrong, complaint in (
        (strange(), rf"{name}\.scale is an object of someones_own_code\.Settings"),
        (torch.ones(2), rf"holds 1 tensors that the model does not have, first {name}\.scale"),
    ):
        torch.save(content | {"model": content["model"] | {f"{name}.scale": wrong}}, path)
        with pytest.raises(CheckpointError, match=complaint):
            open_weights(written, config=config)
    content["model"]["language_model.layers.0.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int8)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is stored as int8.*quantised"):
        open_weights(written, config=config)


def test_files_that_are_no_folder_and_folders_without_a_tracker(
    models: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = models["LLaMA"]
    with pytest.raises(CheckpointError, match="is a file, not a checkpoint's folder; name the folder"):
        open_weights(folder / "model.safetensors")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"GGUF of llama\.cpp, which is not read"):
        open_weights(tmp_path)
    written = write_llama(tmp_path / "there", load_file(folder / "model.safetensors"), 8, 3)
    (written / "latest_checkpointed_iteration.txt").unlink()
    with pytest.raises(CheckpointError, match="name one of the checkpoints in it: release"):
        open_weights(written)
    weights = load_file(folder / "model.safetensors")
    both = write_llama(tmp_path / "both", weights, 8, 3)
    shutil.copytree(write_llama(tmp_path / "ds", weights, 8, 3, deepspeed=True), both, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="holds two checkpoints"):
        open_weights(both, config=read_model_config(folder / "config.json"))


@pytest.mark.parametrize("to", ["huggingface", "native"])
def test_what_is_said_of_a_folder_that_says_itself_what_it_is_is_compared(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, to: Any
) -> None:
    folder, _ = models["LLaMA"]
    there = tmp_path / "there"
    convert(Conversion(open_weights(folder), there, to, verify_logits=False, workers=1))
    config = read_model_config(folder / "config.json")
    assert open_weights(there, config=config, vocab_size=config.vocab_size).config == config
    for change in (
        {"rotary_base": 5e5},
        {"num_layers": 2},
        {"tie_word_embeddings": True},
        {"vocab_size": 64},
    ):
        with pytest.raises(CheckpointError, match=rf"the config given says {next(iter(change))}="):
            open_weights(there, config=config.model_copy(update=change))
    with pytest.raises(CheckpointError, match="orig_vocab_size=64 contradicts"):
        open_weights(there, vocab_size=64)
    (tmp_path / "other.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0.5})
    )
    for flags in (("--model-config", tmp_path / "other.json"), ("--orig-vocab-size", 64)):
        done = call("asd-ckpt", "convert", "--load", there, "--save", tmp_path / "new", *flags)
        assert done.status == 1
        assert not (tmp_path / "new").exists()
        assert f"leave {flags[0]} out" in done.complaint


ARGUMENTS_THAT_CHANGE_THE_MODEL = (
    ("no_rope_freq", [0, 1, 1]),
    ("qk_l2_norm", True),
    ("softmax_type", "off-by-one"),
    ("rope_scaling_type", "yarn"),
    ("noop_layers", "2"),
    ("add_rmsnorm_offset", True),
    ("embedding_multiplier_scale", 12.0),
    ("output_logit_softcapping", 30.0),
    ("scale_depth", 1.4),
    ("sliding_window", 4),
    ("position_embedding_type", "none"),
    ("position_embedding_type", "yarn"),
    ("window_size", 4096),
    ("rotary_base", "10000"),
    ("rotary_seq_len_interpolation_factor", -2),
)
"""Of Megatron-LM and MindSpeed-LLM; none of them leaves a trace in the tensors."""


def test_arguments_that_no_tensor_shows_are_honoured_or_refused(
    models: dict[str, tuple[Path, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = models["LLaMA 2 70B"]
    plan = WritePlan("megatron", shard_layout(3))
    there = tmp_path / "there"
    convert(
        Conversion(open_weights(folder), there, "megatron", write_plan=plan, verify_logits=False, workers=1)
    )
    (there / "release/ascendspeed.json").unlink()
    path = next(there.rglob("*.pt"))
    content = torch.load(path, weights_only=False)

    def opened(given: ModelConfig | None = None, **arguments: Any) -> WeightSource:
        torch.save(content | {"args": Namespace(**(vars(content["args"]) | arguments))}, path)
        return open_weights(there, config=given)

    plain = opened().config
    for name, value in ARGUMENTS_THAT_CHANGE_THE_MODEL:
        with pytest.raises(
            CheckpointError, match=f"{name}=.*name the model's config.json with --model-config"
        ):
            opened(**{name: value})
    assert opened(embedding_multiplier_scale=1.0, softmax_type="vanilla", window_size=(-1, 0)).config == plain
    assert opened(window_size=(15, 0)).config == plain.model_copy(update={"sliding_window": 16})
    # Megatron-LM's RotaryEmbedding multiplies positions by 1 / factor, which transformers calls linear.
    stretched = opened(rotary_seq_len_interpolation_factor=4).config
    linear = json.loads((folder / "config.json").read_text())
    linear["rope_parameters"] = {**linear["rope_parameters"], "rope_type": "linear", "factor": 4.0}
    (tmp_path / "config.json").write_text(json.dumps(linear))
    assert stretched.rotary_scaling == read_model_config(tmp_path / "config.json").rotary_scaling
    opened(output_logit_softcapping=30.0, given=plain)
    assert "its arguments say output_logit_softcapping=30.0; used is what the model's config says" in (
        capsys.readouterr().err
    )
    for version in (0, 1.0):
        torch.save(content | {"checkpoint_version": version}, path)
        with pytest.raises(CheckpointError, match=r"checkpoint_version=.*save it again"):
            open_weights(there)
