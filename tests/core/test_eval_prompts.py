"""Texts that a model writes while it is trained: those of its checkpoints, under every layout; it trains as before."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.training import RecomputeConfig
from ascendspeed_core.device import Device
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.recompute import apply_recompute
from ascendspeed_core.training.eval_prompts import find_continue_texts, read_prompts
from ascendspeed_core.weights import InitialWeights
from ascendspeed_data.errors import AscendSpeedError, DataError
from support.commands import call, run_command
from support.models import save_hugging_face, tiny_config
from support.processes import WorkerPool

PROMPTS = ("the people of", "one of them was", "so it is")
NEW_TOKENS = 12


def config(**changes: Any) -> Any:
    return tiny_config(vocab_size=400, max_position_embeddings=64, **changes)


def continued(layout: Layout, tokenizer: Path, joined: bool = False) -> tuple[list[str], bool]:
    """What a model in the middle of training writes under a layout, and whether it still trains afterwards."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(InitialWeights(config(initializer_range=0.3), 5), mesh, torch.float64, joined)
    apply_recompute(model, RecomputeConfig(checkpoint_activations=True), mesh.pp_rank)
    model.train()
    texts = find_continue_texts()(model, mesh, tokenizer, PROMPTS, NEW_TOKENS)
    return texts, model.training and all(p.requires_grad for p in model.parameters())


LAYOUTS = {
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "pp2 vpp1": Layout(pp=2, schedule="interleaved", layers_per_stage=1),
    "pp2 zbv": Layout(pp=2, schedule="zbv"),
    "dp2": Layout(dp=2, sharded_optimizer=True),
    "tp2 pp2": Layout(tp=2, pp=2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(workers: WorkerPool, tokenizer_folder: Path, name: str) -> None:
    ((want, _),) = workers.run(continued, 1, Layout(), tokenizer_folder)
    assert len(set(want)) == len(PROMPTS)
    assert all(want)
    for joined in (False, True):
        for got, trains in workers.run(
            continued, LAYOUTS[name].world_size, LAYOUTS[name], tokenizer_folder, joined
        ):
            assert got == want
            assert trains


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("base")
    save_hugging_face(config(), folder / "hf", tokenizer=tokenizer_folder)
    (folder / "prompts.txt").write_text("\n".join((*PROMPTS[:2], "", PROMPTS[2])) + "\n")
    return folder


def pretrain(folder: Path, base: Path, dataset: Path, *flags: object, run: Any = call) -> Any:
    return run(
        "asd-core", "pretrain", "--load", base / "hf", "--save", folder, "--device", "cpu", "--dtype", "float64",
        "--data-path", dataset, "--seq-length", 32, "--split", "100,0,0", "--global-batch-size", 4, "--lr", 0.01,
        "--train-iters", 4, "--save-interval", 2, *flags,
    )  # fmt: skip


def samples(base: Path, *more: object) -> tuple[object, ...]:
    return (
        "--eval-prompts", base / "prompts.txt", "--eval-generate-interval", 2, "--eval-max-new-tokens", NEW_TOKENS,
        *more,
    )  # fmt: skip


def written(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_a_run_writes_what_its_checkpoints_would(base: Path, dataset: Path, tmp_path: Path) -> None:
    from ascendspeed_infer.language_model import LanguageModel

    recompute = ("--checkpoint-activations",)
    plain = pretrain(tmp_path / "plain", base, dataset, *recompute)
    assert plain.status == 0, plain.stderr
    done = pretrain(tmp_path / "run", base, dataset, *recompute, *samples(base))
    assert done.status == 0, done.stderr
    found = written(tmp_path / "run")
    assert [(one["iteration"], one["prompt"]) for one in found] == [(n, p) for n in (2, 4) for p in PROMPTS]
    for iteration in (2, 4):
        model = LanguageModel.from_pretrained(tmp_path / "run" / f"iter_{iteration:07d}", device="cpu")
        want = [one.text for one in model.generate(list(PROMPTS), max_new_tokens=NEW_TOKENS)]
        assert [one["text"] for one in found if one["iteration"] == iteration] == want
    assert [one["text"] for one in found[:3]] != [one["text"] for one in found[3:]], "the model has learned"
    assert f"sample at iteration 4: {PROMPTS[0]!r} -> {found[3]['text']!r}" in done.stderr
    with_samples, without = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "plain"))
    assert [r["lm_loss"] for r in with_samples] == [r["lm_loss"] for r in without], (
        "training is left as it is"
    )
    assert [r.get("samples") for r in with_samples] == [None, 3, None, 3]
    pictures = [(tmp_path / name / "loss.png").read_bytes() for name in ("run", "plain")]
    assert pictures[0] != pictures[1], "marks where samples were written"


def test_a_run_under_a_layout_that_goes_on(base: Path, dataset: Path, tmp_path: Path) -> None:
    one = pretrain(tmp_path / "one", base, dataset, *samples(base))
    assert one.status == 0, one.stderr
    layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--nproc-per-node", 4)
    first = pretrain(
        tmp_path / "two", base, dataset, *samples(base), *layout, "--exit-interval", 2, run=run_command
    )
    assert first.status == 0, first.stderr
    assert len(written(tmp_path / "two")) == len(PROMPTS)
    # As if it had been killed after it wrote, and before it saved.
    with (tmp_path / "two" / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 4, "prompt": "a", "text": "b"}) + '\n{"iterat')
    second = pretrain(tmp_path / "two", base, dataset, *samples(base), "--auto-resume")
    assert second.status == 0, second.stderr
    assert "dropped 2 lines past iteration 2" in second.stderr
    assert written(tmp_path / "two") == written(tmp_path / "one")


def test_prompts_of_json_lines(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('"one\\ntwo"\n\n{"prompt": "three", "id": 3}\n')
    assert read_prompts(tmp_path / "p.jsonl") == ("one\ntwo", "three")
    (tmp_path / "p.jsonl").write_text('"one"\n{"text": "three"}\n')
    with pytest.raises(DataError, match="line 2 is neither a text nor an object"):
        read_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text("one\n")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_prompts(tmp_path / "p.jsonl")


def test_bad_input_is_one_line(
    base: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complaint(*flags: object, status: int = 1) -> str:
        done = pretrain(tmp_path / "bad", base, dataset, *flags)
        assert done.status == status, done.stderr
        return str(done.complaint)

    assert "go together" in complaint("--eval-prompts", base / "prompts.txt", status=2)
    assert "means nothing without --eval-prompts" in complaint("--eval-max-new-tokens", 3, status=2)
    layout = ("--tensor-model-parallel-size", 2, "--nproc-per-node", 2, "--sequence-parallel")
    assert "eval_prompts with sequence_parallel=true" in complaint(*samples(base), *layout, status=2)
    context = ("--context-parallel-size", 2, "--nproc-per-node", 2)
    assert "eval_prompts with context_parallel_size=2" in complaint(*samples(base), *context, status=2)
    assert "none.txt does not exist; check --eval-prompts" in complaint(
        *samples(base, "--eval-prompts", tmp_path / "none.txt")
    )
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no prompt" in complaint(*samples(base, "--eval-prompts", tmp_path / "empty.txt"))
    assert "prompt 1 has" in complaint(*samples(base, "--eval-max-new-tokens", 64))
    everything = metadata.entry_points

    def without(**wanted: str) -> Any:
        none = wanted.get("group") == "ascendspeed_core.continue_texts"
        return metadata.EntryPoints() if none else everything(**wanted)

    monkeypatch.setattr(metadata, "entry_points", without)
    assert "install ascendspeed-infer" in complaint(*samples(base))
    with pytest.raises(AscendSpeedError, match="needs a package that generates text"):
        find_continue_texts()
