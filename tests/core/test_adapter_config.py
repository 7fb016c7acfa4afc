"""An adapter's config and weights are honoured whole, or refused by name; nothing of them is left out in silence."""

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ascendspeed_core.weights.adapters.adapter_config import HONOURED, REFUSED, read_adapter_config
from ascendspeed_core.weights.adapters.ascendspeed import open_adapter
from ascendspeed_core.weights.source import CheckpointError
from support.commands import environment
from support.models import tiny_config
from support.tables import ReportTables

MODEL = tiny_config()
MODULES = [
    f"model.layers.{layer}.self_attn.{name}"
    for layer in range(MODEL.num_layers)
    for name in ("q_proj", "o_proj")
]
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 6,
    "target_modules": ["q_proj", "o_proj"],
}


def write(folder: Path, changes: dict[str, Any] | None = None) -> Path:
    """Write an adapter of queries and outputs, without peft."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for number, module in enumerate(MODULES):
        generator = torch.Generator().manual_seed(number)
        for half, shape in (("A", (2, MODEL.hidden_size)), ("B", (MODEL.hidden_size, 2))):
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | (changes or {})))
    return folder


def test_every_field_of_peft_is_decided_on() -> None:
    from peft import LoraConfig

    honoured = [field.name for field in HONOURED]
    refused = [field.name for field in REFUSED if "=" not in field.name]
    assert sorted(honoured + refused) == sorted(field.name for field in dataclasses.fields(LoraConfig))
    assert all(field.reason and field.remedy for field in REFUSED)


def test_the_documented_fields_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "finetuning.md").read_text(encoding="utf-8")
    for field in HONOURED:
        assert f"| `{field.name}` | {field.meaning} |" in page
    table = page.partition("### Adapters of peft")[2].partition("|---|---|\n")[2].partition("\n\n")[0]
    assert len(table.splitlines()) == len(HONOURED)


CHANGING: dict[str, Any] = {
    "use_dora": True, "lora_bias": True, "layer_replication": [[0, 2], [1, 2]], "trainable_token_indices": [1, 2],
    "target_parameters": ["experts.up_proj"], "alora_invocation_tokens": [5], "megatron_config": {"a": 1},
    "use_qalora": True, "arrow_config": {}, "kasa_config": {}, "velora_config": {}, "monteclora_config": {},
    "use_bdlora": {}, "init_lora_weights": "pissa",
}  # fmt: skip
"""By field a value that changes what is computed."""


@pytest.mark.parametrize("name", [field.name for field in REFUSED])
def test_what_changes_the_result_is_refused_by_name(tmp_path: Path, name: str) -> None:
    name, _, value = name.partition("=")
    given = value or CHANGING[name]
    with pytest.raises(CheckpointError, match=f"{name}=.* is not supported: .*; "):
        open_adapter(write(tmp_path / "adapter", {name: given}), MODEL)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16' is not supported: the base's"),
        ({"init_lora_weights": "new"}, "init_lora_weights='new' is not supported: this version does not know it"),
        ({"a_later_field": 3}, "a_later_field=3 is not supported: this version does not know it"),
        ({"peft_type": "IA3"}, "peft_type='IA3' is not supported: .*; only LoRA adapters are read"),
        ({"task_type": "SEQ_CLS"}, "task_type='SEQ_CLS' is not supported: .* has CAUSAL_LM: write that if it is one"),
        ({"lorap_emb_lr": "x"}, "lorap_emb_lr='x' is not supported"),
        ({"swift_type": "ADAPTER"}, "swift_type='ADAPTER' is not supported"),
        ({"r": 0}, "r=0 is not supported"),
        ({"r": 3}, r"has shape .*, and adapter_config.json says rank r=3"),
        ({"lora_alpha": float("nan")}, "NaN is no number of JSON"),
        ({"lora_alpha": "x"}, "lora_alpha='x' is not supported"),
        ({"rank_pattern": {"o_proj": 5}}, "says rank r=5"),
        ({"target_modules": "self_attn.("}, "a pattern is no regular expression"),
        ({"target_modules": r".*self_attn"}, "target_modules means model.layers.0.self_attn, which is no linear layer"),
        ({"target_modules": ["c_attn"]}, "means no module of this model"),
        ({"target_modules": ["q_proj"]}, "belongs to a module that target_modules does not mean"),
        ({"target_modules": ["q_proj", "o_proj", "v_proj"]}, "lacks .*v_proj.lora_A.*, which target_modules promises"),
        ({"layers_to_transform": [1]}, "belongs to a module that target_modules does not mean"),
        ({"modules_to_save": ["lm_head"]}, "lacks lm_head.weight, which modules_to_save promises"),
        ({"modules_to_save": ["self_attn"]}, "lacks|means no module"),
        ({"target_modules": r".*(q|o)_proj", "layers_to_transform": 1}, "cannot be used when `target_modules` is"),
    ],
)  # fmt: skip
def test_bad_configs(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        open_adapter(write(tmp_path / "adapter", changes), MODEL)


def test_fields_of_other_programs_change_nothing(tmp_path: Path) -> None:
    """What ms-swift and LLaMA-Factory add, and fields that peft takes empty."""
    plain = open_adapter(write(tmp_path / "plain"), MODEL)
    draw = random.Random(5)
    values: dict[str, list[Any]] = {
        "lorap_lr_ratio": [16.0, 4, None], "lorap_emb_lr": [1e-6, None], "lora_dtype": ["float32", "AUTO", None],
        "loraplus_lr_ratio": [16.0], "loraplus_lr_embedding": [1e-6], "swift_type": ["LORA", None],
        "use_merged_linear": [False], "enable_lora": [None, []], "layers_pattern": ["", None, []],
        "exclude_modules": ["", None, []], "modules_to_save": [None, []], "unknown": [None, False, ""],
    }  # fmt: skip
    for number in range(40):
        names = draw.sample(sorted(values), draw.randint(1, 5))
        changes = {name: draw.choice(values[name]) for name in names}
        found = open_adapter(write(tmp_path / str(number), changes), MODEL)
        assert found.updates.keys() == plain.updates.keys(), changes
        for module, update in found.updates.items():
            assert torch.equal(update.a, plain.updates[module].a)
            assert torch.equal(update.b, plain.updates[module].b)
            assert update.scale == plain.updates[module].scale
        assert (found.saved, found.remarks) == ({}, ())


def test_no_peft_type(tmp_path: Path) -> None:
    folder = write(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "target_modules": ["q_proj", "o_proj"]}))
    with pytest.raises(CheckpointError, match="does not say peft_type; add"):
        open_adapter(folder, MODEL)


VALUES = (
    None,
    True,
    False,
    0,
    3,
    -1,
    1.5,
    "",
    "q_proj",
    "(",
    [],
    ["q_proj"],
    [1],
    {},
    {"q_proj": 2},
    {"a": "b"},
)


NOT_KEPT = (
    "eva_config",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
    "peft_version",
    "unknown",
)
"""Fields that peft's class changes or drops; all without effect."""


def test_values_of_any_type_are_taken_or_refused(tmp_path: Path, report: ReportTables) -> None:
    """No traceback, whatever stands in a field; what is taken is what peft's class makes of it."""
    names = [field.name for field in HONOURED] + [field.name for field in REFUSED if "=" not in field.name]
    path = write(tmp_path / "adapter") / "adapter_config.json"
    taken = refused = 0
    for name in (*names, "unknown"):
        for value in VALUES:
            path.write_text(json.dumps(CONFIG | {name: value}))
            try:
                found = getattr(read_adapter_config(path), name, None)
                taken += 1
            except CheckpointError as error:
                refused += 1
                assert "\n" not in str(error)
                continue
            if name not in NOT_KEPT:
                kept = sorted(found) if isinstance(found, set) else found
                assert kept == (value or kept), name
    report.add("Fields of an adapter's config with values of any type", ("tried", "taken", "refused", "tracebacks"),
               taken + refused, taken, refused, 0)  # fmt: skip
    assert refused > taken > 100


def drop(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    del tensors[name]


def drop_module(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    module = name.partition(".lora_")[0]
    for key in [key for key in tensors if key.startswith(module)]:
        del tensors[key]


def drop_all(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    tensors.clear()


def cut(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    dim = draw.randrange(2)
    tensors[name] = tensors[name].narrow(dim, 0, tensors[name].shape[dim] - 1).contiguous()


def flatten(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    tensors[name] = torch.zeros(draw.choice((0, tensors[name].numel())))


def transpose(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    tensors[name] = tensors[name].T.contiguous()


def spoil(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = draw.choice((float("nan"), float("inf")))


def to_integers(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    tensors[name] = tensors[name].to(draw.choice((torch.int8, torch.int64)))


def add(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    others = (
        "lora_A.other",
        "lora_magnitude_vector",
        "lora_B.bias",
        "lora_A.weight.absmax",
        "token_adapter.trainable_tokens_delta",
    )
    tensors[f"{name.partition('.lora_')[0]}.{draw.choice(others)}"] = torch.ones(2, 32)


def of_another_adapter(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    other = next(key for key in tensors if key != name)
    for key, adapter in ((name, "first"), (other, "second")):
        tensors[key.replace(".weight", f".{adapter}.weight")] = tensors.pop(key)


def rename(tensors: dict[str, torch.Tensor], name: str, draw: random.Random) -> None:
    old, new = draw.choice(
        (("layers.0", "layers.9"), ("layers.1", "layers.x"), ("q_proj", "v_proj"), ("lora_A", "lora_C"))
    )
    for key in [key for key in tensors if old in key]:
        tensors[key.replace(old, new)] = tensors.pop(key)


DAMAGE: tuple[Callable[[dict[str, torch.Tensor], str, random.Random], None], ...] = (
    drop, drop_module, drop_all, cut, flatten, transpose, spoil, to_integers, add, of_another_adapter, rename,
)  # fmt: skip


def damage(folder: Path, report: ReportTables, seeds: range) -> None:
    whole = load_file(write(folder / "adapter") / "adapter_model.safetensors")
    open_adapter(folder / "adapter", MODEL)
    accepted = []
    for seed in seeds:
        draw = random.Random(seed)
        kind = draw.choice(DAMAGE)
        tensors = {name: tensor.clone() for name, tensor in whole.items()}
        kind(tensors, draw.choice(sorted(tensors)), draw)
        (folder / "adapter" / "adapter_model.bin").unlink(missing_ok=True)
        (folder / "adapter" / "adapter_model.safetensors").unlink(missing_ok=True)
        if draw.random() < 0.5:
            torch.save(tensors, folder / "adapter" / "adapter_model.bin")
        else:
            save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
        try:
            adapter = open_adapter(folder / "adapter", MODEL)
            merge_by(adapter)
            accepted.append(f"{seed}: {kind.__name__}")
        except CheckpointError:
            pass
    title = "Weights of adapters, damaged at random"
    report.add(title, ("tried", "refused", "taken"), len(seeds), len(seeds) - len(accepted), len(accepted))
    assert not accepted


def merge_by(adapter: Any) -> None:
    """Put an adapter onto random weights, where shapes are compared."""
    from ascendspeed_core.weights import InitialWeights
    from ascendspeed_core.weights.adapters.merge import MergedAdapter

    MergedAdapter(InitialWeights(MODEL, 5), adapter)


def test_damaged_weights(tmp_path: Path, report: ReportTables) -> None:
    damage(tmp_path, report, range(80))


@pytest.mark.nightly
def test_much_damage(tmp_path: Path, report: ReportTables) -> None:
    damage(tmp_path, report, range(1000, 2500))


def test_what_is_said(tmp_path: Path) -> None:
    changes = {
        "target_modules": ["q_proj", "o_proj", "c_attn"], "base_model_name_or_path": "org/other", "revision": "v2",
        "alpha_pattern": {"c_proj": 3}, "modules_to_save": ["classifier"],
    }  # fmt: skip
    folder = write(tmp_path / "adapter", changes)
    torch.save({}, folder / "adapter_model.bin")
    remarks = open_adapter(folder, MODEL, tmp_path / "base").remarks
    said = ["adapter_model.bin is not read", "target_modules names c_attn", "modules_to_save names classifier",
            "alpha_pattern names c_proj", "was trained on org/other at revision v2; it is loaded onto"]  # fmt: skip
    assert len(remarks) == len(said)
    assert all(part in remark for part, remark in zip(said, remarks, strict=True))
    assert open_adapter(write(tmp_path / "plain"), MODEL, tmp_path / "base").remarks == ()


def test_peft_is_imported_for_an_adapter_only() -> None:
    """Its import takes longer than all of this project's."""
    code = (
        "import sys, ascendspeed_core, ascendspeed_core.training.validate\n"
        "import ascendspeed_core.weights.adapters.ascendspeed\n"
        "print([name for name in ('peft', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
