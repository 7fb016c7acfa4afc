"""The same .bin/.idx, seed and split give megatron-core's own samples, in the order of Megatron-LM's sampler."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.training import DataConfig
from ascendspeed_core.data.gpt_dataset import GPTBatchLoader, check_data
from ascendspeed_core.data.sample_index import refuse_pickled_indices
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_data.errors import DataError
from support.corpus import write_dataset
from support.processes import WorkerPool

VOCABULARY, SEED, SAMPLES = 97, 4321, (60, 12, 0)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("blend")
    return [str(write_dataset(folder / name, VOCABULARY, 40 + 20 * n, n)) for n, name in enumerate("ab")]


def configs(prefixes: list[str]) -> dict[str, DataConfig]:
    a, b = prefixes
    return {
        "one corpus": DataConfig(data_path=(a,), seq_length=16, split="8,2,0"),
        "nothing validated": DataConfig(data_path=(b,), seq_length=9, split="97,1,2"),
        "a blend": DataConfig(data_path=("0.3", a, "0.7", b), seq_length=16, split="8,2,0"),
        "weights that are no shares": DataConfig(data_path=("2", a, "6", b), seq_length=8, split="90,10,0"),
    }


def null_tokenizer() -> Any:
    """Megatron-LM's tokenizer of data that are ids already, which megatron-core has from 0.15 on."""
    try:
        from megatron.core.tokenizers import MegatronTokenizer, megatron_tokenizer
    except ModuleNotFoundError:
        identifiers = {"class": "_NullTokenizer", "vocab_size": VOCABULARY}
        return SimpleNamespace(eod=VOCABULARY - 1, pad=-1, unique_identifiers=identifiers)
    # Its name in 0.17 and later, and before.
    library = "null-text" if hasattr(megatron_tokenizer, "TEXT_LIBRARIES") else "null"
    return MegatronTokenizer.from_pretrained(metadata_path={"library": library}, vocab_size=VOCABULARY)


def theirs(config: DataConfig, cache: Path) -> list[Any]:
    """What megatron-core builds, called as Megatron-LM's pretrain_gpt.py calls it."""
    prefixes, weights = config.blend()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    options = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=config.seq_length,
        blend=(prefixes, weights),
        split=config.split,
        path_to_cache=str(cache),
        tokenizer=null_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    built: list[Any] = BlendedMegatronDatasetBuilder(GPTDataset, list(SAMPLES), lambda: True, options).build()
    torch.distributed.destroy_process_group()
    return built


@pytest.mark.parametrize("case", ["one corpus", "nothing validated", "a blend", "weights that are no shares"])
def test_samples_equal_megatron_cores_own(prefixes: list[str], tmp_path: Path, case: str) -> None:
    config = configs(prefixes)[case].model_copy(update={"data_cache_path": tmp_path / "ours"})
    samples = (SAMPLES[0], 0, 0) if case == "nothing validated" else SAMPLES
    mesh = ParallelMesh(Device("cpu"), Layout())
    ours = GPTBatchLoader(config, SEED, samples, VOCABULARY, None, mesh)
    reference = theirs(config, tmp_path / "theirs")
    pairs = [(ours.train, reference[0], samples[0]), (ours.validation, reference[1], samples[1])]
    for mine, their, count in pairs:
        for number in range(count):
            for key in ("tokens", "labels", "loss_mask"):
                assert torch.equal(mine[number][key], their[number][key])
        if count and not hasattr(their, "datasets"):
            assert np.array_equal(mine.document_index, their.document_index)
            assert np.array_equal(mine.shuffle_index, their.shuffle_index)
            assert np.array_equal(mine.sample_index, their.sample_index)
    assert len({tuple(ours.train[n]["tokens"].tolist()) for n in range(20)}) == 20


def numbers_of_ranks(config: DataConfig, layout: Layout, size: int, micro: int) -> list[list[list[int]]]:
    mesh = ParallelMesh.create(Device("cpu"), layout)
    data = GPTBatchLoader(config, SEED, SAMPLES, VOCABULARY, None, mesh)
    step = size * micro * layout.dp
    return [
        [list(r) for r in data.sample_numbers(consumed, (size,) * micro)] for consumed in (0, step, 5 * step)
    ]


def sampler_of_megatron_lm(consumed: int, dp: int, dp_rank: int, size: int, micro: int) -> list[list[int]]:
    """MegatronPretrainingSampler: fill a batch of size x dp in order, each rank takes its run of `size`."""
    batch, found = [], []
    for number in range(consumed, consumed + size * micro * dp):
        batch.append(number)
        if len(batch) == size * dp:
            found.append(batch[dp_rank * size : (dp_rank + 1) * size])
            batch = []
    return found


@pytest.mark.parametrize(
    ("layout", "size", "micro"), [(Layout(dp=2), 3, 2), (Layout(tp=2, dp=2), 1, 3)], ids=str
)
def test_ranks_take_the_samples_of_megatron_lms_sampler(
    workers: WorkerPool, prefixes: list[str], tmp_path: Path, layout: Layout, size: int, micro: int
) -> None:
    config = configs(prefixes)["one corpus"].model_copy(update={"data_cache_path": tmp_path})
    step = size * micro * layout.dp
    for rank, found in enumerate(
        workers.run(numbers_of_ranks, layout.world_size, config, layout, size, micro)
    ):
        for consumed, numbers in zip((0, step, 5 * step), found, strict=True):
            assert numbers == sampler_of_megatron_lm(consumed, layout.dp, rank // layout.tp, size, micro)


def test_the_digest_follows_the_samples(prefixes: list[str], tmp_path: Path) -> None:
    mesh = ParallelMesh(Device("cpu"), Layout())

    def digest(
        config: DataConfig, seed: int = SEED, samples: tuple[int, int, int] = SAMPLES, consumed: int = 20
    ) -> str:
        config = config.model_copy(update={"data_cache_path": tmp_path})
        return GPTBatchLoader(config, seed, samples, VOCABULARY, None, mesh).order_digest(consumed)

    for config in (configs(prefixes)["one corpus"], configs(prefixes)["a blend"]):
        assert digest(config) == digest(config)
        assert digest(config) != digest(config, seed=SEED + 1)
        assert digest(config) != digest(config, consumed=21)
        assert digest(config) != digest(config, samples=(900, 12, 0)), "more epochs, another shuffle"


def test_ids_beyond_the_vocabulary_are_refused(prefixes: list[str], tmp_path: Path) -> None:
    config = configs(prefixes)["one corpus"].model_copy(update={"data_cache_path": tmp_path})
    data = GPTBatchLoader(config, SEED, SAMPLES, 50, None, ParallelMesh(Device("cpu"), Layout()))
    with pytest.raises(
        DataError, match="the model's vocabulary ends at 49; tokenize with the model's tokenizer"
    ):
        data.micro_batches(0, (10, 10))


def test_the_end_of_a_document_can_be_masked(prefixes: list[str], tmp_path: Path) -> None:
    config = configs(prefixes)["one corpus"].model_copy(
        update={"data_cache_path": tmp_path, "eod_mask_loss": True}
    )
    data = GPTBatchLoader(config, SEED, SAMPLES, VOCABULARY, 5, ParallelMesh(Device("cpu"), Layout()))
    (batch,) = data.micro_batches(0, (30,))
    assert torch.equal(batch.loss_mask == 0, batch.tokens == 5)
    assert (batch.tokens == 5).any()


def test_an_empty_split_is_refused(prefixes: list[str], tmp_path: Path) -> None:
    mesh = ParallelMesh(Device("cpu"), Layout())
    for split, what in (("0,100,0", "no training document"), ("100,0,0", "no validation document")):
        config = DataConfig(data_path=(prefixes[0],), seq_length=16, split=split, data_cache_path=tmp_path)
        with pytest.raises(DataError, match=what):
            GPTBatchLoader(config, SEED, SAMPLES, VOCABULARY, None, mesh)


def test_a_pickled_index_is_refused_and_a_damaged_one_built_again(tmp_path: Path) -> None:
    np.save(tmp_path / "a-shuffle_index.npy", np.arange(3))
    (tmp_path / "b-shuffle_index.npy").write_bytes((tmp_path / "a-shuffle_index.npy").read_bytes()[:-4])
    refuse_pickled_indices(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a-shuffle_index.npy"]
    np.save(tmp_path / "c-shuffle_index.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="holds pickled objects"):
        refuse_pickled_indices(tmp_path)


def test_parts_of_a_blend_need_one_tokenizer(dataset: Path, tmp_path: Path, corpus: Path) -> None:
    from ascendspeed_data.preprocess import PreprocessJob, preprocess_dataset
    from ascendspeed_data.train_tokenizer import TokenizerTraining, train_sentencepiece

    other = train_sentencepiece([str(corpus)], "text", tmp_path / "other", TokenizerTraining(380))
    job = PreprocessJob((str(corpus),), tmp_path / "other", other)
    preprocess_dataset(job)
    config = DataConfig(data_path=("1", str(dataset), "1", str(job.column_prefix("text"))), seq_length=8)
    with pytest.raises(DataError, match="were made with different tokenizers"):
        check_data(config, SAMPLES)
