from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.corpus import make_texts, write_json_lines
from support.processes import WorkerPool
from support.tables import ReportTables

TABLES = ReportTables()


@pytest.fixture(scope="session")
def workers() -> Iterator[WorkerPool]:
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def megatron_workers() -> Iterator[WorkerPool]:
    """Processes of their own: megatron-core on a CPU changes `torch.Tensor`."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def report() -> ReportTables:
    return TABLES


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small JSON lines file."""
    return write_json_lines(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", make_texts())


@pytest.fixture(scope="session")
def tokenizer_folder(corpus: Path) -> Path:
    """A SentencePiece tokenizer trained on the corpus."""
    from ascendspeed_data.train_tokenizer import TokenizerTraining, train_sentencepiece

    return train_sentencepiece([str(corpus)], "text", corpus.parent / "tokenizer", TokenizerTraining(400))


@pytest.fixture(scope="session")
def dataset(corpus: Path, tokenizer_folder: Path) -> Path:
    """The corpus, tokenized; the prefix of its .bin/.idx."""
    from ascendspeed_data.preprocess import PreprocessJob, preprocess_dataset

    job = PreprocessJob((str(corpus),), corpus.parent / "corpus", tokenizer_folder)
    preprocess_dataset(job)
    return job.column_prefix("text")


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> tuple[Path, Path]:
    """The same samples with labels, one by one and packed; the prefixes of both."""
    from support.instruction import make_instruction_sets

    return make_instruction_sets(tmp_path_factory.mktemp("instruction"), tokenizer_folder)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the tables of a process of pytest-xdist to the one that prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["tables"] = TABLES.tables


class TablesOfProcesses:
    """Takes the tables over from each process of pytest-xdist as it ends."""

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        TABLES.merge(getattr(node, "workeroutput", {}).get("tables", {}))


def pytest_configure(config: pytest.Config) -> None:
    from ascendspeed_core.megatron import spare_triton

    # Tests import megatron-core themselves.
    spare_triton()
    config.pluginmanager.register(TablesOfProcesses())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for line in TABLES.render():
        terminalreporter.write_line(line)
