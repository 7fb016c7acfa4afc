"""Pre-training whose attention and positions stay inside documents: what megatron-core masks, each document alone."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import (
    GPTDataset,
    GPTDatasetConfig,
    _get_ltor_masks_and_position_ids,
)

from ascendspeed_core.build import apply_kernels, load_model
from ascendspeed_core.config.finetune import FinetuneDataConfig
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.preference import PreferenceDataConfig
from ascendspeed_core.config.training import ComputeConfig, DataConfig
from ascendspeed_core.data.documents import document_positions, find_end_of_document
from ascendspeed_core.data.gpt_dataset import GPTBatchLoader
from ascendspeed_core.device import Device
from ascendspeed_core.kernels.mask_rule import attention_mask
from ascendspeed_core.megatron import group_for_megatron
from ascendspeed_core.models.transformer import ModelInput, Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.weights import InitialWeights
from ascendspeed_data.errors import DataError
from ascendspeed_data.indexed import IndexedDatasetWriter
from core.test_context_parallel import MODELS as CONTEXT_MODELS
from core.test_layout_equality import TOLERANCE, differences, without_key_bias
from core.training_cases import Trained, join_stages, train
from core.zero_cases import train_zero
from support.commands import call
from support.corpus import write_dataset
from support.models import tiny_config
from support.processes import WorkerPool
from support.tables import ReportTables

ALONE = ParallelMesh(Device("cpu"), Layout())
END, VOCABULARY, LENGTH = 7, 97, 24
CPU = torch.device("cpu")


def test_masks_and_positions_are_those_of_megatron_core(report: ReportTables) -> None:
    draw, disagreements, tried = random.Random(3), 0, 400
    for _ in range(tried):
        length, often = draw.randint(1, 40), draw.choice((0.0, 0.05, 0.3, 0.9, 1.0))
        tokens = torch.tensor([END if draw.random() < often else draw.randint(8, 20) for _ in range(length)])
        hidden, _, positions = _get_ltor_masks_and_position_ids(tokens, END, True, True, True, True)
        ours = document_positions(tokens[None], END)
        seen = attention_mask(length, length, None, None, torch.float64, CPU, ours.segments)
        assert seen is not None
        disagreements += not torch.equal(ours.positions[0], positions)
        disagreements += not torch.equal(~seen[0, 0], hidden[0])
    title = "Documents inside samples against megatron-core: masks and positions"
    report.add(title, ("rows drawn", "disagreements"), tried, disagreements)
    assert not disagreements


def write_documents(prefix: Path, seed: int, count: int = 50) -> Path:
    """Documents of random lengths, most of which end with the token, some of which have it inside."""
    draw = np.random.default_rng(seed)
    documents = [draw.integers(8, VOCABULARY, draw.integers(1, 30)) for _ in range(count)]
    for number, document in enumerate(documents):
        document[-1] = END if number % 7 else document[-1]
        if number % 11 == 0:
            document[len(document) // 2] = END
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_documents(list(map(len, documents)), np.concatenate(documents).astype(np.uint16))
        writer.finish()
    return prefix


def loader(config: DataConfig, mesh: ParallelMesh = ALONE) -> GPTBatchLoader:
    return GPTBatchLoader(config, 5, (40, 0, 0), VOCABULARY, END, mesh)


@pytest.mark.parametrize("seed", [1, 2])
def test_batches_are_megatron_cores_own(tmp_path: Path, seed: int) -> None:
    prefix = str(write_documents(tmp_path / "data", seed))
    flags = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    config = DataConfig(
        data_path=(prefix,), seq_length=LENGTH, split="1,0,0", data_cache_path=tmp_path / "ours", **flags
    )
    (batch,) = loader(config).micro_batches(0, (40,))

    class Tokenizer:
        eod, pad, vocab_size = END, -2, None
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    options = GPTDatasetConfig(
        random_seed=5, sequence_length=LENGTH, blend=([prefix], None), split="1,0,0", tokenizer=Tokenizer(),
        path_to_cache=str(tmp_path / "theirs"), create_attention_mask=True, **flags,
    )  # fmt: skip
    with group_for_megatron():
        theirs = BlendedMegatronDatasetBuilder(GPTDataset, [40, 0, 0], lambda: True, options).build()[0]
    assert batch.positions is not None
    assert batch.segments is not None
    seen = attention_mask(LENGTH, LENGTH, None, None, torch.float64, CPU, batch.segments)
    assert seen is not None
    for number in range(40):
        want = theirs[number]
        assert torch.equal(batch.tokens[number], want["tokens"])
        assert torch.equal(batch.labels[number], want["labels"])
        assert torch.equal(batch.loss_mask[number], want["loss_mask"])
        assert torch.equal(batch.positions[number], want["position_ids"])
        assert torch.equal(~seen[number], want["attention_mask"])


def test_each_option_alone(tmp_path: Path) -> None:
    prefix = str(write_documents(tmp_path / "data", 1))
    given = {"data_path": (prefix,), "seq_length": LENGTH, "split": "1,0,0", "data_cache_path": tmp_path}
    for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        (batch,) = loader(DataConfig(**given, **{name: True})).micro_batches(0, (4,))
        assert (batch.positions is not None) == (name == "reset_position_ids")
        assert (batch.segments is not None) == (name == "reset_attention_mask")
        assert bool((batch.loss_mask == 0).any()) == (name == "eod_mask_loss")


MODELS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "ALiBi": {"position": "alibi"},
    "sliding window": {"sliding_window": 5},
}


def model_of(attention: str, **changes: Any) -> Transformer:
    model = load_model(InitialWeights(tiny_config(**changes), seed=5), ALONE, torch.float64)
    apply_kernels(model, ComputeConfig(attention=attention))  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("attention", ["sdpa", "triangle", "reference"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_document_is_read_as_if_it_were_alone(report: ReportTables, kind: str, attention: str) -> None:
    model = model_of(attention, **MODELS[kind])
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, 40, (6, 48), generator=generator)
    tokens = torch.where(tokens % 8 == 0, END, tokens)
    positions, segments = document_positions(tokens, END)
    with torch.no_grad():
        together = model(ModelInput(tokens, positions, segments)).logits
        worst, documents = 0.0, 0
        for row in range(len(tokens)):
            for number in range(int(segments[row].max()) + 1):
                mine = segments[row] == number
                alone = model(ModelInput(tokens[row][mine][None])).logits[0]
                worst = max(worst, float((together[row][mine] - alone).abs().max()))
                documents += 1
    title = "Documents inside samples against each alone: largest difference of a logit, float64"
    report.add(
        title, ("positions", "attention", "documents", "difference"), kind, attention, documents, worst
    )
    # Sums over keys run in another order where the row is longer.
    assert worst < 1e-12
    assert documents > 20


LAYOUTS = {
    "tp2 sp": Layout(tp=2, sequence_parallel=True),
    "pp2": Layout(pp=2),
    "cp2 tp2": Layout(cp=2, tp=2),
    "tp2 pp2 dp2 sp sharded": Layout(tp=2, pp=2, dp=2, sequence_parallel=True, sharded_optimizer=True),
}
FURTHER_LAYOUTS = {
    "tp2": Layout(tp=2),
    "tp8 sp": Layout(tp=8, sequence_parallel=True),
    "dp2": Layout(dp=2),
    "dp2 sharded": Layout(dp=2, sharded_optimizer=True),
    "pp4": Layout(pp=4),
    "pp2 virtual": Layout(pp=2, schedule="interleaved", layers_per_stage=1),
    "pp2 virtual, zero bubble": Layout(pp=2, schedule="interleaved-zb", layers_per_stage=1),
    "pp2 zbv": Layout(pp=2, schedule="zbv"),
    "pp2 dualpipev": Layout(pp=2, schedule="dualpipev"),
    "pp2 dp2 fold": Layout(pp=2, dp=2, schedule="looped-bfs", layers_per_stage=1, early_reduction=True),
    "cp2": Layout(cp=2),
    "cp4": Layout(cp=4),
    "cp2 pp2": Layout(cp=2, pp=2),
    "cp2 dp2 sharded": Layout(cp=2, dp=2, sharded_optimizer=True),
    "cp2 tp2 pp2 sp": Layout(cp=2, tp=2, pp=2, sequence_parallel=True),
}
SWEPT_MODELS = {name: CONTEXT_MODELS[name] for name in ("LLaMA", "sliding window", "Bloom", "Qwen 3")}
CASES: list[Any] = [
    ("LLaMA", "tp2 sp", "sdpa"),
    ("Bloom", "pp2", "reference"),
    ("LLaMA", "cp2 tp2", "triangle"),
    ("Bloom", "cp2 tp2", "sdpa"),
    ("sliding window", "tp2 pp2 dp2 sp sharded", "sdpa"),
]
"""Model, layout, attention."""
SWEEP = [
    pytest.param(model, layout, attention, marks=pytest.mark.nightly)
    for model in SWEPT_MODELS
    for layout in (*LAYOUTS, *FURTHER_LAYOUTS)
    for attention in ("sdpa", "triangle", "reference")
    if (model, layout, attention) not in CASES
]


@cache
def one_process(name: str) -> Trained:
    torch.set_num_threads(1)
    return train(tiny_config(**CONTEXT_MODELS[name]), Layout(), "float64", steps=3, documents=True)


@pytest.mark.parametrize(("name", "layout_name", "attention"), [*CASES, *SWEEP], ids=str)
def test_layouts(
    workers: WorkerPool, report: ReportTables, name: str, layout_name: str, attention: str
) -> None:
    layout = (LAYOUTS | FURTHER_LAYOUTS)[layout_name]
    ranks = workers.run(
        train, layout.world_size, tiny_config(**CONTEXT_MODELS[name]), layout, "float64", steps=3,
        documents=True, compute=ComputeConfig(attention=attention),
    )  # fmt: skip
    got, want = join_stages(ranks, layout), one_process(name)
    if name == "Bloom":
        got, want = without_key_bias(got), without_key_bias(want)
    found = differences(got, want)
    title = "Documents inside samples, three steps against one process, float64: largest relative difference"
    header = ("model", "layout", "attention", "losses", "grad norm", "first gradients", "weights after")
    report.add(title, header, name, layout_name, attention, *found)
    assert all(value <= limit for value, limit in zip(found, TOLERANCE["float64"], strict=True)), found


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, dp=2, zero_stage=3),
        *(
            pytest.param(layout, marks=pytest.mark.nightly)
            for layout in (Layout(dp=2, zero_stage=1), Layout(cp=2, zero_stage=2))
        ),
    ],
    ids=str,
)
def test_deepspeed(workers: WorkerPool, layout: Layout) -> None:
    given: dict[str, Any] = {"steps": 3, "documents": True, "adam_eps": 1e-3}
    (want,) = workers.run(train, 1, tiny_config(), Layout(), "float32", **given)
    ranks = workers.run(train_zero, layout.world_size, tiny_config(), layout, "float32", **given)
    # DeepSpeed adds up in fp32, in another order.
    assert ranks[0].losses == pytest.approx(want.losses, rel=2e-5)
    assert ranks[0].norms == pytest.approx(want.norms, rel=2e-5)


def test_a_context_parallel_rank_keeps_whole_segments(tmp_path: Path, workers: WorkerPool) -> None:
    prefix = str(write_documents(tmp_path / "data", 1))
    config = DataConfig(
        data_path=(prefix,), seq_length=LENGTH, split="1,0,0", data_cache_path=tmp_path,
        reset_position_ids=True, reset_attention_mask=True,
    )  # fmt: skip
    ((positions, segments),) = workers.run(batch_of_rank, 1, config, Layout())
    parts = workers.run(batch_of_rank, 2, config, Layout(cp=2))
    assert torch.equal(torch.cat([part[0] for part in parts], dim=1), positions)
    assert all(torch.equal(part[1], segments) for part in parts)


def batch_of_rank(config: DataConfig, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    (batch,) = loader(config, ParallelMesh.create(Device("cpu"), layout)).micro_batches(0, (4,))
    assert batch.positions is not None
    assert batch.segments is not None
    return batch.positions, batch.segments


def test_the_end_of_a_document_must_be_known(
    tmp_path: Path, dataset: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def config(prefix: Path) -> DataConfig:
        return DataConfig(data_path=(str(prefix),), seq_length=8, reset_attention_mask=True)

    assert find_end_of_document(config(dataset), None) == 2
    bare = write_dataset(tmp_path / "bare", 300)
    with pytest.raises(
        DataError, match=r"reset_attention_mask: which token .* is not known, as .* no manifest"
    ):
        find_end_of_document(config(bare), None)
    with pytest.raises(DataError, match=r"none of 60 documents of .* ends with id 2.*--append-eod"):
        find_end_of_document(config(bare), tokenizer_folder)
    assert "its documents end where" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reset_attention_mask", "reset_position_ids", "eod_mask_loss"])
def test_samples_with_labels_have_no_documents(name: str) -> None:
    given: dict[str, Any] = {"data_path": ("x",), "seq_length": 8, name: True}
    with pytest.raises(ValueError, match=f"{name}=true is for plain text"):
        FinetuneDataConfig(**given, is_instruction_dataset=True)
    with pytest.raises(ValueError, match=f"{name}=true is for plain text"):
        PreferenceDataConfig(**given)
    assert FinetuneDataConfig(**given).document_options == [name]


def test_the_command_says_where_documents_end(dataset: Path, tmp_path: Path) -> None:
    import json

    from ascendspeed_core.models.families import find_family

    model = tmp_path / "model.json"
    model.write_text(json.dumps(find_family("llama").write_config(tiny_config(vocab_size=400))))
    command: list[object] = [
        "asd-core", "pretrain", "--model-config", model, "--data-path", dataset, "--split", "1,0,0", "--seq-length", 16,
        "--train-iters", 1, "--device", "cpu", "--dry-run",
    ]  # fmt: skip
    done = call(*command, "--reset-attention-mask", "--reset-position-ids")
    assert done.status == 0, done.stderr
    assert "documents: each ends with id 2 (reset_attention_mask, reset_position_ids)" in done.stderr
    bare = write_dataset(tmp_path / "bare", 300)
    command[command.index("--data-path") + 1] = bare
    refused = call(*command, "--reset-position-ids")
    assert refused.status == 1
    assert "reset_position_ids: which token ends a document is not known" in refused.complaint
