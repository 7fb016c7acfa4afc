"""Preference tuning: losses and gradients against a straight computation and trl, layouts, runs that go on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.lora import LoraConfig
from ascendspeed_core.config.preference import PreferenceConfig
from ascendspeed_core.config.training import RecomputeConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.data.padded_dataset import PaddedBatchLoader
from ascendspeed_core.data.preference_dataset import PREFERENCE_FORMAT, PreferenceDataset, collate_pairs
from ascendspeed_core.device import Device
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.objectives.dpo import METRICS, PreferenceLoss
from ascendspeed_core.observability.metrics import read_metrics
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.training.step import forward_backward
from ascendspeed_core.weights import InitialWeights, open_weights
from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import DataError
from core.dpo_cases import PAIRS, POLICY_SEED, REFERENCE_SEED, Tuned, data_config, tune
from core.test_sft_dataset import distances
from core.training_cases import PlainPasses, join_stages
from support.commands import call, run_command
from support.models import save_hugging_face, tiny_config
from support.pairs import LENGTH, make_pairs
from support.processes import WorkerPool
from support.tables import ReportTables

ALONE = ParallelMesh(Device("cpu"), Layout())
VOCABULARY = 400
LOSSES = {
    "sigmoid": {"dpo_beta": 0.3},
    "smoothed": {"dpo_beta": 0.3, "dpo_label_smoothing": 0.1},
    "ipo": {"dpo_loss": "ipo", "dpo_beta": 0.3},
    "hinge": {"dpo_loss": "hinge", "dpo_beta": 0.1},
    "with sft": {"dpo_beta": 0.3, "dpo_sft_weight": 0.5},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The prefix of pairs."""
    return make_pairs(tmp_path_factory.mktemp("pairs"), tokenizer_folder)


def config(**changes: Any) -> Any:
    return tiny_config(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **changes)


def preference(name: str) -> PreferenceConfig:
    return PreferenceConfig(**LOSSES[name])


def models() -> tuple[Transformer, Transformer]:
    ours, reference = (
        load_model(InitialWeights(config(), seed), ALONE, torch.float64)
        for seed in (POLICY_SEED, REFERENCE_SEED)
    )
    return ours, reference


def passes(model: Transformer) -> Any:
    return PlainPasses(model)


def micro_batches(prefix: Path, sizes: tuple[int, ...]) -> list[MicroBatch]:
    data = PaddedBatchLoader(
        PREFERENCE_FORMAT, data_config(prefix, LENGTH), 7, (sum(sizes), 0, 0), VOCABULARY, ALONE
    )
    return data.micro_batches(0, sizes)


def straight_log_prob(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum over the answer of one row without its padding, and its tokens, token by token."""
    end = int(mask.nonzero().max()) + 1
    logits = model(ModelInput(tokens[None, : end + 1])).logits[0]
    total = torch.zeros((), dtype=torch.float64)
    for place in range(end):
        if mask[place]:
            total = total + logits[place].log_softmax(-1)[tokens[place + 1]]
    return total, int(mask.sum())


def straight_loss(
    model: Any, reference: Any, batches: list[MicroBatch], name: str
) -> tuple[torch.Tensor, dict[str, float]]:
    """The mean over pairs, one answer at a time, by the formulas of the papers; and what is told beside."""
    settings = {"dpo_loss": "sigmoid", "dpo_label_smoothing": 0.0, "dpo_sft_weight": 0.0, **LOSSES[name]}
    beta, wrong = float(settings["dpo_beta"]), float(settings["dpo_label_smoothing"])
    losses, told = [], []
    for batch in batches:
        for row in range(0, len(batch.tokens), 2):
            policy, compared = [], []
            for side in (row, row + 1):
                total, length = straight_log_prob(model, batch.tokens[side], batch.loss_mask[side])
                if side == row:
                    own = -total / length
                with torch.no_grad():
                    known, _ = straight_log_prob(reference, batch.tokens[side], batch.loss_mask[side])
                by = length if settings["dpo_loss"] == "ipo" else 1
                policy.append(total / by)
                compared.append(known / by)
            h = (policy[0] - compared[0]) - (policy[1] - compared[1])
            if settings["dpo_loss"] == "ipo":
                loss = (h - 1 / (2 * beta)) ** 2
            elif settings["dpo_loss"] == "hinge":
                loss = torch.clamp(1 - beta * h, min=0)
            else:
                loss = -(1 - wrong) * torch.log(torch.sigmoid(beta * h))
                loss = loss - wrong * torch.log(1 - torch.sigmoid(beta * h))
            losses.append(loss + float(settings["dpo_sft_weight"]) * own)
            rewards = [beta * (p - c).item() for p, c in zip(policy, compared, strict=True)]
            told.append(
                [*rewards, rewards[0] - rewards[1], rewards[0] > rewards[1], *(p.item() for p in policy)]
            )
    means = np.mean(np.asarray(told, float), axis=0).tolist()
    return torch.stack(losses).mean(), dict(zip(METRICS, means, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_a_straight_computation(
    pairs: Path, report: ReportTables, name: str
) -> None:
    model, reference = models()
    batches = micro_batches(pairs, (3, 1, 2))
    assert len({int(row.sum()) for batch in batches for row in batch.loss_mask}) > 3, (
        "answers of many lengths"
    )
    want, told = straight_loss(model, reference, batches, name)
    want.backward()
    wanted = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    objective = PreferenceLoss(model, reference, preference(name), ALONE)
    count, loss_of = objective.prepare(batches)
    got = forward_backward(model, passes(model), batches, ALONE, count, loss_of)
    assert count == 6
    worst = max(
        float((parameter.grad - wanted[key]).abs().max() / wanted[key].abs().max())
        for key, parameter in model.named_parameters()
    )
    title = "Preference losses against a straight computation, float64: relative differences"
    report.add(title, ("loss", "value", "gradients"), name, abs(got.loss.item() / want.item() - 1), worst)
    # The order of sums differs with padding and batching.
    assert got.loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert worst < 1e-9
    assert objective.metrics() == pytest.approx(told, rel=1e-10)
    assert 0 < told["reward_accuracy"] < 1
    measured = objective.evaluate(batches)
    assert measured == pytest.approx({"loss": want.item(), **told}, rel=1e-10)


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge"])
def test_losses_and_gradients_are_those_of_trl(
    pairs: Path, tokenizer_folder: Path, tmp_path: Path, name: str
) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    theirs, their_reference = (
        save_hugging_face(config(), tmp_path / f"hf{seed}", seed, tokenizer_folder) for seed in (0, 1)
    )
    settings = preference(name)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf0")
    tokenizer.pad_token = tokenizer.eos_token
    trainer = DPOTrainer(
        model=theirs,
        ref_model=their_reference,
        args=DPOConfig(
            str(tmp_path / "trl"), beta=settings.dpo_beta, loss_type=[settings.dpo_loss], bf16=False, use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
    )  # fmt: skip
    (batch,) = micro_batches(pairs, (PAIRS,))
    order = [*range(0, 2 * PAIRS, 2), *range(1, 2 * PAIRS, 2)]
    answers = F.pad(batch.loss_mask, (1, 0))[:, :-1].long()
    # Up to the last id of the answer; trl gives no attention to padding, which changes nothing on the right.
    attended = answers.flip(-1).cummax(-1).values.flip(-1)
    inputs = {"input_ids": batch.tokens, "attention_mask": attended, "completion_mask": answers}
    loss = trainer.compute_loss(theirs, {key: value[order] for key, value in inputs.items()})
    loss.backward()

    model, reference = (load_model(open_weights(tmp_path / f"hf{n}"), ALONE, torch.float32) for n in (0, 1))
    objective = PreferenceLoss(model, reference, settings, ALONE)
    count, loss_of = objective.prepare([batch])
    ours = forward_backward(model, passes(model), [batch], ALONE, count, loss_of)
    # Both compute in fp32.
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for mine, its in (
        ("embedding.weight", "model.embed_tokens.weight"),
        ("layers.0.attention.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("layers.3.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight"),
        ("output_head.weight", "lm_head.weight"),
    ):
        got, want = model.get_parameter(mine).grad, theirs.get_parameter(its).grad
        assert got is not None
        assert want is not None
        assert (got - want).abs().max() < 1e-4 * want.abs().max()


def test_a_tie_counts_for_half(pairs: Path) -> None:
    model, _ = models()
    reference, _ = models()
    objective = PreferenceLoss(model, reference, preference("sigmoid"), ALONE)
    found = objective.evaluate(micro_batches(pairs, (4,)))
    assert found["loss"] == pytest.approx(np.log(2), rel=1e-12)
    assert (found["reward_margin"], found["reward_accuracy"]) == (0, 0.5)


LAYOUTS: dict[str, tuple[Layout, str, dict[str, Any]]] = {
    "tp2": (Layout(tp=2), "sigmoid", {}),
    "tp2 sp": (Layout(tp=2, sequence_parallel=True), "ipo", {}),
    "pp2": (Layout(pp=2), "with sft", {}),
    "pp2 vpp1": (Layout(pp=2, schedule="interleaved", layers_per_stage=1), "sigmoid", {}),
    "pp2 zbv": (Layout(pp=2, schedule="zbv"), "hinge", {}),
    "dp2": (Layout(dp=2), "sigmoid", {}),
    "dp2 sharded": (Layout(dp=2, sharded_optimizer=True), "ipo", {"micro_batch_size": 1}),
    "tp2 pp2": (Layout(tp=2, pp=2), "smoothed", {"micro_batch_size": 4}),
    "cp2": (Layout(cp=2), "with sft", {}),
    "cp2 pp2": (Layout(cp=2, pp=2), "ipo", {}),
    "recompute": (Layout(), "sigmoid", {"recompute": RecomputeConfig(checkpoint_activations=True)}),
    "mbs 1": (Layout(), "with sft", {"micro_batch_size": 1}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(workers: WorkerPool, report: ReportTables, pairs: Path, name: str) -> None:
    layout, loss, changes = LAYOUTS[name]
    model, data = config(), data_config(pairs, LENGTH)
    (want,) = workers.run(tune, 1, model, Layout(), data, preference(loss))
    ranks: list[Tuned] = workers.run(
        tune, layout.world_size, model, layout, data, preference(loss), **changes
    )
    got = join_stages([rank.trained for rank in ranks], layout)
    found = distances(got, want.trained)
    title = "Preference tuning against one process, float64: largest relative differences"
    report.add(title, ("layout", "loss", "losses and norms", "gradients", "weights"), name, loss, *found)
    assert max(found) < 1e-9
    for rank in ranks:
        for ours, theirs in zip(rank.measures, want.measures, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)
    assert want.measures[0] != want.measures[1]


@pytest.mark.parametrize("name", ["1", "tp2 sp", "tp2 pp2"])
def test_adapters_are_compared_with_the_model_without_them(
    workers: WorkerPool, report: ReportTables, pairs: Path, name: str
) -> None:
    layout = {
        "1": Layout(),
        "tp2 sp": Layout(tp=2, sequence_parallel=True),
        "tp2 pp2": Layout(tp=2, pp=2),
    }[name]
    lora = LoraConfig(lora_target_modules=("all-linear",), lora_r=4)
    options = {"lora": lora, "preference": preference("sigmoid")}
    data = data_config(pairs, LENGTH)
    (want,) = workers.run(tune, 1, config(), Layout(), data, is_switched=False, **options)
    ranks: list[Tuned] = workers.run(tune, layout.world_size, config(), layout, data, **options)
    got = join_stages([rank.trained for rank in ranks], layout)
    found = distances(got, want.trained)
    title = "Preference tuning of adapters, base switched on, against two models in one process, float64"
    report.add(title, ("layout", "losses and norms", "gradients", "weights"), name, *found)
    assert max(found) < 1e-9
    assert all(".lora_" in key for key in want.trained.gradients)
    assert want.measures[0]["reward_margin"] != 0, "adapters that already do something"


def test_long_answers_are_cut_and_pairs_without_one_left_out(pairs: Path) -> None:
    dataset = open_dataset(pairs)
    whole = PreferenceDataset(dataset, "100,0,0", 0, LENGTH)
    assert len(whole) == 40
    short = PreferenceDataset(dataset, "100,0,0", 0, 12)
    assert (short.num_cut, short.num_dropped) > (0, 0)
    assert len(short) + short.num_dropped == 40
    for number in range(len(short)):
        row = short[number]
        assert max(row.lengths) == short.lengths[number] <= 12
        batch = collate_pairs([row], 16)
        assert batch.tokens.shape == (2, 16)
        assert bool(batch.loss_mask.any(-1).all()), "both answers have something to compare"
    with pytest.raises(DataError, match="leaves no training pair"):
        PreferenceDataset(dataset, "100,0,0", 0, 2)


def dpo(folder: Path, model: Path, *flags: object, run: Any = run_command) -> Any:
    return run(
        "asd-core", "dpo", "--load", model, "--save", folder, "--device", "cpu", "--dtype", "float64",
        "--seq-length", LENGTH, "--split", "80,20,0", "--global-batch-size", 8, "--micro-batch-size", 4,
        "--lr", 1e-3, "--train-iters", 4, "--log-interval", 1, *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("base") / "hf"
    save_hugging_face(config(), folder, tokenizer=tokenizer_folder)
    return folder


def test_a_run_goes_on_with_its_reference(pairs: Path, base: Path, tmp_path: Path) -> None:
    flags = ("--data-path", pairs, "--eval-interval", 2, "--eval-iters", 1)
    one = dpo(tmp_path / "one", base, *flags)
    assert one.status == 0, one.stderr
    first = dpo(tmp_path / "two", base, *flags, "--exit-interval", 2)
    assert first.status == 0, first.stderr
    # Of its own checkpoint, which is not what it is compared with.
    second = dpo(tmp_path / "two", tmp_path / "two", *flags, "--nproc-per-node", 2)
    assert second.status == 0, second.stderr
    assert "resumed at iteration 2" in second.stderr
    assert f"reference: {base}" in second.stderr
    want, got = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert want[0]["lm_loss"] == pytest.approx(np.log(2), rel=1e-9), "the model begins as its own reference"
    for ours, theirs in zip(got, want, strict=True):
        for key in ("lm_loss", *METRICS):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9, abs=1e-12)
    assert got[3]["validation_loss"] == pytest.approx(want[3]["validation_loss"], rel=1e-9)
    assert want[3]["reward_margin"] > want[1]["reward_margin"] > 0
    assert "| reward margin " in one.stderr
    assert " per pair (mean of the last 4 iterations)" in one.stderr

    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    again = dpo(
        tmp_path / "two", tmp_path / "two", *flags, "--reference", moved, "--train-iters", 4, run=call
    )
    assert again.status == 0, again.stderr
    other = dpo(tmp_path / "two", tmp_path / "two", *flags, "--reference", tmp_path / "one", run=call)
    assert other.status == 1
    assert "is not the reference that the run in" in other.complaint
    kept = json.loads((tmp_path / "two" / "iter_0000004" / "checkpoint.json").read_text())["run"]["reference"]
    assert kept["path"] == str(base.resolve())


def test_an_adapter_goes_on_with_its_base(pairs: Path, base: Path, tmp_path: Path) -> None:
    flags = ("--data-path", pairs, "--lora-target-modules", "all-linear", "--lora-r", 4)
    done = dpo(tmp_path / "one", base, *flags, run=call)
    assert done.status == 0, done.stderr
    assert f"reference: {base}, the model without its adapters" in done.stderr
    first = dpo(tmp_path / "two", base, *flags, "--exit-interval", 2, run=call)
    assert first.status == 0, first.stderr
    second = dpo(tmp_path / "two", base, *flags, "--auto-resume", run=call)
    assert second.status == 0, second.stderr
    want, got = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    for ours, theirs in zip(got, want, strict=True):
        assert ours["lm_loss"] == pytest.approx(theirs["lm_loss"], rel=1e-9)
    assert want[0]["lm_loss"] == pytest.approx(np.log(2), rel=1e-9)
    assert want[3]["reward_margin"] > 0
    loaded = dpo(tmp_path / "on", base, "--data-path", pairs, "--lora-load", tmp_path / "one", run=call)
    assert loaded.status == 1
    assert "say with --reference what to compare with" in loaded.complaint
    chosen = dpo(
        tmp_path / "on",
        base,
        "--data-path",
        pairs,
        "--lora-load",
        tmp_path / "one",
        "--reference",
        base,
        run=call,
    )
    assert chosen.status == 0, chosen.stderr
    assert read_metrics(tmp_path / "on" / "metrics.jsonl")[0]["reward_margin"] > 0


def test_bad_input_is_one_line(pairs: Path, base: Path, dataset: Path, tmp_path: Path) -> None:
    def complaint(*flags: object, status: int = 1) -> str:
        done = dpo(tmp_path / "bad", base, *flags, run=call)
        assert done.status == status, done.stderr
        return str(done.complaint)

    assert "holds plain text, not pairs" in complaint("--data-path", dataset)
    assert "leaves no validation pair" in complaint(
        "--data-path", pairs, "--split", "100,0,0", "--eval-iters", 1, "--eval-interval", 2
    )
    data = ("--data-path", pairs)
    assert "dpo_label_smoothing=0.1 has no meaning for dpo_loss=ipo" in complaint(
        *data, "--dpo-loss", "ipo", "--dpo-label-smoothing", 0.1, status=2
    )
    assert "manual_mbs=auto measures single samples" in complaint(
        *data, "--optimized-pipeline", "--manual-mbs", "auto", status=2
    )
    assert "zero_stage and deepspeed do not go with preference tuning" in complaint(
        *data, "--zero-stage", 1, status=2
    )
    save_hugging_face(tiny_config(vocab_size=512, max_position_embeddings=LENGTH), tmp_path / "wider")
    assert "vocab_size=512" in complaint(*data, "--reference", tmp_path / "wider")
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    done = call(
        "asd-core", "dpo", "--model-config", tmp_path / "config.json", *data, "--seq-length", LENGTH,
        "--train-iters", 1,
    )  # fmt: skip
    assert done.status == 2
    assert "random weights, which prefer nothing" in done.complaint
    done = call("asd-core", "pretrain", "--load", base, *data, "--seq-length", LENGTH, "--train-iters", 1)
    assert "train on them with `asd-core dpo`" in done.complaint
