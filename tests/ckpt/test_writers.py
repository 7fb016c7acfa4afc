"""Every format, both ways, under every layout: the bits of all weights come back."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ascendspeed_ckpt import Conversion, convert
from ascendspeed_ckpt.config import TargetKind
from ascendspeed_ckpt.writers.write_plan import ExternalKind, WritePlan
from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import WeightSource, open_weights
from ascendspeed_core.weights.shard_layout import shard_layout
from ascendspeed_core.weights.source import CheckpointError
from core.test_checkpoint import read, write
from support.ascendspeed_2023 import read_llama
from support.commands import call
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool
from support.shared_data import STORIES, needs_shared_data
from support.tables import ReportTables

CONFIG = tiny_config(vocab_size=130)
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1 pp1": {},
    "tp2 pp1": {"tp": 2},
    "tp1 pp2": {"pp": 2},
    "tp2 pp2": {"tp": 2, "pp": 2},
    "tp4 pp1": {"tp": 4},
    "uneven stages": {"tp": 2, "pp": 2, "layers_of_stages": (3, 1)},
    "virtual pipeline": {"tp": 2, "pp": 2, "layers_per_chunk": 1},
}
NAMES: dict[str, tuple[ExternalKind, dict[str, Any]]] = {
    "ascendspeed": ("ascendspeed", {}),
    "ascendspeed, merged mlp": ("ascendspeed", {"merged_mlp": True}),
    "megatron": ("megatron", {}),
    "megatron, own layers": ("megatron", {"transformer_engine": False}),
    "torch_dist": ("torch_dist", {}),
}


def external(name: str, config: ModelConfig, **layout: Any) -> WritePlan:
    kind, naming = NAMES[name]
    return WritePlan(kind, shard_layout(config.num_layers, **layout), **naming)


def to(source: Path | WeightSource, target: Path, kind: TargetKind, layout: WritePlan | None = None) -> Path:
    convert(Conversion(source, target, kind, write_plan=layout, verify_logits=False))
    return target


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor of a Hugging Face folder."""
    return {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "hf"
    save_hugging_face(CONFIG, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(model: Path, tmp_path: Path, name: str, layout: str) -> None:
    target = external(name, CONFIG, **LAYOUTS[layout])
    native = to(model, tmp_path / "native", "native")
    there = to(native, tmp_path / "there", target.kind, target)
    back = to(there, tmp_path / "back", "huggingface")
    assert digests(back) == digests(model)
    source = open_weights(there)
    assert source.kind == target.kind
    assert source.config == CONFIG
    assert getattr(source, "vocabulary_rows") == target.vocabulary_rows(CONFIG) > CONFIG.vocab_size  # noqa: B009


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_an_independent_reader_of_2023_finds_the_weights(
    model: Path, tmp_path: Path, layout: str, merged: bool
) -> None:
    name = "ascendspeed, merged mlp" if merged else "ascendspeed"
    target = external(name, CONFIG, **LAYOUTS[layout])
    to(model, tmp_path / "there", "ascendspeed", target)
    found = read_llama(
        tmp_path / "there", CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.vocab_size
    )
    want = load_file(model / "model.safetensors")
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key]) for key in want)


def test_another_layout_is_the_same_command_and_gives_what_a_direct_conversion_gives(
    model: Path, tmp_path: Path
) -> None:
    flags = ["--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    first = call("asd-ckpt", "convert", "--load", model, "--save", tmp_path / "tp4", "--to", "ascendspeed",
                 "--tensor-model-parallel-size", 4, "--no-verify-logits")  # fmt: skip
    assert first.status == 0, first.stderr
    again = call("asd-ckpt", "convert", "--load", tmp_path / "tp4", "--save", tmp_path / "again", *flags)
    direct = call("asd-ckpt", "convert", "--load", model, "--save", tmp_path / "direct", *flags)
    assert (again.status, direct.status) == (0, 0), again.stderr + direct.stderr
    assert "vocabulary: 130 ids, padded to 256 rows" in again.stderr
    for path in sorted((tmp_path / "direct" / "release").glob("mp_rank_*/*.pt")):
        want = torch.load(path, weights_only=False)["model"]
        got = torch.load(tmp_path / "again" / path.relative_to(tmp_path / "direct"), weights_only=False)[
            "model"
        ]
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key], got[key]) for key in want)
    checksums = [
        json.loads((tmp_path / name / "release" / "ascendspeed.json").read_text())["checksums"]
        for name in ("again", "direct")
    ]
    assert checksums[0] == checksums[1]
    assert call("asd-ckpt", "verify", tmp_path / "again", tmp_path / "tp4").status == 0


def test_padding_repeats_the_last_row_and_is_recorded(model: Path, tmp_path: Path) -> None:
    to(model, tmp_path / "there", "ascendspeed", external("ascendspeed", CONFIG))
    (path,) = (tmp_path / "there").glob("release/mp_rank_00/*.pt")
    stored = torch.load(path, weights_only=False)
    rows = stored["model"]["embedding.word_embeddings.weight"]
    assert rows.shape[0] == 256
    assert torch.equal(rows[130:], rows[129:130].expand(126, -1))
    assert (stored["args"].vocab_size, stored["args"].padded_vocab_size) == (130, 256)
    record = json.loads((tmp_path / "there/release/ascendspeed.json").read_text())
    assert (record["vocabulary_rows"], record["model"]["vocab_size"]) == (256, 130)


def test_checkpoints_of_others_are_read_by_what_they_say(model: Path, tmp_path: Path) -> None:
    """Without our record: arguments, then a config, then a size by name; each says the same model."""
    there = to(model, tmp_path / "there", "ascendspeed", external("ascendspeed", CONFIG, tp=2))
    (there / "release" / "ascendspeed.json").unlink()
    for path in there.glob("release/mp_rank_*/*.pt"):
        content = torch.load(path, weights_only=False)
        del content["ascendspeed"]
        torch.save(content, path)
    assert open_weights(there).config == open_weights(model).config
    for path in there.glob("release/mp_rank_*/*.pt"):
        content = torch.load(path, weights_only=False)
        content["args"] = {"padded_vocab_size": 256}
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"do not say num_attention_heads; .*--model-config"):
        open_weights(there)
    done = call("asd-ckpt", "verify", there, model, "--model-config", model / "config.json")
    assert done.status == 0, done.stderr
    refused = call("asd-ckpt", "convert", "--load", there, "--save", tmp_path / "x", "--type", "7B")
    assert refused.status == 1
    assert "holds 4 layers, the model has 32" in refused.complaint
    (there / "config.json").write_bytes((model / "config.json").read_bytes())
    assert open_weights(there).config == open_weights(model).config


def test_padding_of_unknown_size_is_asked_for(model: Path, tmp_path: Path) -> None:
    there = to(model, tmp_path / "there", "megatron", external("megatron", CONFIG))
    (there / "release" / "ascendspeed.json").unlink()
    (path,) = there.glob("release/mp_rank_00/*.pt")
    content = torch.load(path, weights_only=False)
    del content["args"].vocab_size, content["ascendspeed"]
    torch.save(content, path)
    done = call("asd-ckpt", "convert", "--load", there, "--save", tmp_path / "x")
    assert done.status == 1
    assert "256 rows, but nothing says how many of them are padding; give --orig-vocab-size" in done.complaint
    done = call("asd-ckpt", "convert", "--load", there, "--save", tmp_path / "x", "--orig-vocab-size", 130)
    assert done.status == 0, done.stderr
    assert digests(tmp_path / "x") == digests(model)


def test_a_tied_head(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=130, tie_word_embeddings=True)
    save_hugging_face(config, tmp_path / "hf")
    for name in NAMES:
        target = external(name, config, pp=2)
        there = to(tmp_path / "hf", tmp_path / name, target.kind, target)
        back = to(there, tmp_path / f"{name} back", "huggingface")
        assert digests(back) == digests(tmp_path / "hf")
    last = torch.load(tmp_path / "megatron/release/mp_rank_00_001/model_optim_rng.pt", weights_only=False)[
        "model"
    ]
    first = torch.load(tmp_path / "megatron/release/mp_rank_00_000/model_optim_rng.pt", weights_only=False)[
        "model"
    ]
    assert torch.equal(last["output_layer.weight"], first["embedding.word_embeddings.weight"])


def test_old_pickled_files_both_ways(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = call("asd-ckpt", "convert", "--load", model, "--save", tmp_path / "bin", "--to", "huggingface",
                "--weights-format", "bin", "--max-shard-size", "40KB")  # fmt: skip
    assert done.status == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "bin").glob("*.bin"))
    assert files[0] == f"pytorch_model-00001-of-{len(files):05d}.bin"
    back = to(tmp_path / "bin", tmp_path / "back", "huggingface")
    assert digests(back) == digests(model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "bin").state_dict()
    assert all(
        torch.equal(theirs[key], tensor) for key, tensor in load_file(model / "model.safetensors").items()
    )


def test_every_kind_trains_under_any_layout(model: Path, tmp_path: Path, workers: WorkerPool) -> None:
    """What a process reads of an external checkpoint is what it reads of the Hugging Face folder."""
    there = {
        name: to(model, tmp_path / name, NAMES[name][0], external(name, CONFIG, tp=2, pp=2)) for name in NAMES
    }
    layout = Layout(tp=2, pp=2)
    want = workers.run(digests_of_slices, 4, str(model), layout)
    for path in there.values():
        assert workers.run(digests_of_slices, 4, str(path), layout) == want


def test_commands_start_from_any_kind(tmp_path: Path, tokenizer_folder: Path, dataset: Path) -> None:
    config = tiny_config(vocab_size=400)
    save_hugging_face(config, tmp_path / "hf", tokenizer=tokenizer_folder)
    answers, losses = {}, {}
    for name in ("hf", "ascendspeed", "megatron", "torch_dist"):
        load = tmp_path / name
        if name != "hf":
            target = external(name, config, tp=2, pp=2)
            to(tmp_path / "hf", load, target.kind, target)
        prompt = ["--prompt", "the year", "--max-new-tokens", 8, "--device", "cpu"]
        said = call("asd-infer", "generate", "--load", load, *prompt)
        assert said.status == 0, said.stderr
        answers[name] = said.stdout
        save = tmp_path / f"{name} trained"
        flags = [
            "--data-path",
            dataset,
            "--seq-length",
            16,
            "--train-iters",
            2,
            "--split",
            "100,0,0",
            "--device",
            "cpu",
        ]
        cache = ["--data-cache-path", tmp_path / "cache"]
        done = call("asd-core", "pretrain", "--load", load, *flags, *cache, "--save", save)
        assert done.status == 0, done.stderr
        lines = (save / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["lm_loss"] for line in lines]
    assert len({str(value) for value in answers.values()}) == 1
    assert len({str(value) for value in losses.values()}) == 1


def digests_of_slices(folder: str, layout: Layout) -> dict[str, str]:
    mesh = ParallelMesh.create(Device("cpu"), layout)
    loaded = load_model(open_weights(Path(folder)), mesh, torch.float32)
    return {
        name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for name, parameter in loaded.named_parameters()
    }


def test_optimizer_state_moves_between_native_checkpoints(workers: WorkerPool, tmp_path: Path) -> None:
    workers.run(write, 2, str(tmp_path / "run"), Layout(tp=2), "bfloat16")
    to(tmp_path / "run", tmp_path / "copy", "native")
    a, b = (
        (workers.run(read, 2, str(tmp_path / name), Layout(dp=2), "bfloat16", 2)) for name in ("run", "copy")
    )
    assert a[0][1] == b[0][1]
    for (name, (_, first)), (_, second) in zip(a[0][0].items(), b[0][0].values(), strict=True):
        assert torch.equal(first, second), name
    done = call(
        "asd-ckpt", "convert", "--load", tmp_path / "run", "--save", tmp_path / "hf", "--to", "huggingface"
    )
    assert "not converted: optimizer" in done.stderr
    assert "not converted: rng" in done.stderr


REFUSED: dict[str, tuple[dict[str, Any], ExternalKind, str]] = {
    "query-key norms in 2023": ({"qk_norm": True}, "ascendspeed", "has no norms of queries and keys"),
    "a window in 2023": ({"sliding_window": 8}, "ascendspeed", "has no sliding window"),
    "ALiBi in GPTModel": ({"position": "alibi"}, "megatron", "has no ALiBi"),
    "an embedding norm in GPTModel": (
        {"embedding_norm": True},
        "torch_dist",
        "has no norm behind the embedding",
    ),
    "heads that are not enough": ({}, "ascendspeed", "does not divide num_key_value_heads=4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_hold_is_named(tmp_path: Path, case: str) -> None:
    from ascendspeed_core.weights import InitialWeights

    changes, kind, complaint = REFUSED[case]
    target = WritePlan(kind, shard_layout(4, tp=8))
    with pytest.raises(CheckpointError, match=complaint):
        to(InitialWeights(tiny_config(**changes), 0), tmp_path / "x", kind, target)
    assert not (tmp_path / "x").exists()


def test_flags_that_contradict(model: Path, tmp_path: Path) -> None:
    x = tmp_path / "x"
    two_stages = ["--to", "megatron", "--pipeline-model-parallel-size", 2]
    for flags, status, complaint in (
        (["--to", "native", "--tensor-model-parallel-size", 2], 2, "does not apply to --to native"),
        (["--deepspeed"], 2, "DeepSpeed checkpoints can be read but not written"),
        (["--to", "ascendspeed", "--tensor-model-parallel-size", 3], 1, "does not divide"),
        ([*two_stages, "--partition-layers", "3,2"], 2, "add up to the model's 4"),
        ([*two_stages, "--num-layers-per-virtual-pipeline-stage", 3], 2, "must divide"),
        (["--type", "7B"], 1, "is a model of 32 layers"),
        (["--type", "8B"], 2, "type=8B is unknown"),
        (["--bias"], 1, "has no biases"),
        (["--pse"], 1, "has no ALiBi"),
        (["--from", "megatron"], 1, "holds no mp_rank_"),
        (["--merge-mlp", "--to", "megatron"], 2, "applies to --to ascendspeed"),
        (["--src-tensor-model-parallel-size", 2], 1, "contradicts"),
    ):  # fmt: skip
        done = call("asd-ckpt", "convert", "--input-model-dir", model, "--output-model-dir", x, *flags)
        assert (done.status, complaint in done.complaint) == (status, True), (flags, done.stderr)
    assert not x.exists()


@needs_shared_data
def test_stories_through_every_format_and_back(tmp_path: Path, report: ReportTables) -> None:
    expected = json.loads((STORIES / "expected.json").read_text())
    config = open_weights(STORIES).config
    want, before = digests(STORIES), STORIES
    stages: list[tuple[str, TargetKind, WritePlan | None]] = [("native", "native", None)]
    for name in NAMES:
        target = external(name, config, tp=2, pp=2)
        stages += [(name, target.kind, target), (f"{name} back", "huggingface", None)]
    for name, kind, layout in stages:
        before = to(before, tmp_path / name, kind, layout)
        ids = greedy(before, expected["cases"])
        assert ids == [case["greedy_ids"] for case in expected["cases"]]
        same = digests(before) == want if kind == "huggingface" else "-"
        assert same in (True, "-")
        report.add(
            "stories260K through the formats",
            ("stage", "sha256 of tensors equal", "greedy ids equal"),
            name,
            same,
            True,
        )


@torch.no_grad()
def greedy(folder: Path, cases: list[dict[str, Any]]) -> list[list[int]]:
    model = load_model(open_weights(folder), ParallelMesh(Device("cpu"), Layout()), torch.float32).eval()
    answers = []
    for case in cases:
        likeliest = model(ModelInput(torch.tensor([case["greedy_ids"]]))).logits[0].argmax(-1)
        start = len(case["prompt_ids"])
        answers.append(case["prompt_ids"] + likeliest[start - 1 : -1].tolist())
    return answers
