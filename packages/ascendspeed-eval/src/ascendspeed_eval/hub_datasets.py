"""Data of tasks from hubs: the files of a dataset, written as those that a task reads.

A dataset is named as on a hub, or by a folder with the hub's files (`hf:/data/gsm8k`). `hf:` alone is the task's
default dataset.
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import EvaluationError, UsageError
from ascendspeed_eval.hub import HUGGING_FACE, fetch, hub_name, origin_of
from ascendspeed_eval.tasks.ceval_subjects import SUBJECTS

OPTION = "task_data_path"
_RECORDS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".txt")
"""Endings of files that tasks read as they are."""
_NOT_RECORDS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
HubRow = Mapping[str, Any]
HubRows = Iterable[HubRow]


@dataclass(frozen=True)
class HubDataset:
    """How to write the files of a task from a dataset of the hub.

    Attributes:
        name: on the hub.
        configs: configurations to load.
        splits: splits of each configuration, the required ones first.
        required: number of required `splits`.
        write: writes the rows of one configuration and split into a folder.
    """

    name: str
    configs: Sequence[str]
    splits: Sequence[str]
    required: int
    write: Callable[[Path, str, str, HubRows], None]


def _json_lines(path: Path, rows: HubRows) -> None:
    path.write_text(
        "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def _csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def _boolq(folder: Path, config: str, split: str, rows: HubRows) -> None:
    """Write BoolQ's rows, or SuperGLUE's, whose passages begin with the title and whose `label` is 0 or 1."""
    name = "dev.jsonl" if split == "validation" else "train.jsonl"
    written = []
    for row in rows:
        answer = {"label": bool(row["label"])} if "label" in row else {"answer": row["answer"]}
        titles = {"title": row["title"]} if "title" in row else {}
        written.append({"question": row["question"], **titles, "passage": row["passage"], **answer})
    _json_lines(folder / name, written)


def _plain(folder: Path, config: str, split: str, rows: HubRows) -> None:
    _json_lines(folder / f"{split}.jsonl", rows)


def _mmlu(folder: Path, config: str, split: str, rows: HubRows) -> None:
    for row in rows:
        line = [row["question"], *row["choices"], "ABCD"[row["answer"]]]
        _csv(folder / split / f"{row['subject']}_{split}.csv", [line])


def _ceval(folder: Path, config: str, split: str, rows: HubRows) -> None:
    columns = ["id", "question", "A", "B", "C", "D", *([] if split == "test" else ["answer"])]
    _csv(folder / split / f"{config}_{split}.csv", [columns, *([row[c] for c in columns] for row in rows)])


DATASETS: Mapping[str, HubDataset] = {
    "boolq": HubDataset("google/boolq", ("default",), ("validation", "train"), 1, _boolq),
    "mmlu": HubDataset("cais/mmlu", ("all",), ("test", "dev"), 2, _mmlu),
    "gsm8k": HubDataset("openai/gsm8k", ("main",), ("test", "train"), 1, _plain),
    "human_eval": HubDataset("openai/openai_humaneval", ("openai_humaneval",), ("test",), 1, _plain),
    "ceval": HubDataset("ceval/ceval-exam", tuple(sorted(SUBJECTS)), ("val", "dev"), 2, _ceval),
}


def find_data(task: str, path: str, folder: Path) -> tuple[str, str | None]:
    """Return the path that a task reads, and `org/name@commit` if its data came from a hub.

    Args:
        task: its name.
        path: as given to `--task-data-path`: a path, a name on a hub, `hf:` alone, or `hf:` with a local folder.
        folder: an empty folder for files that are made.

    Raises:
        UsageError: the task has no dataset on the hub, or a library is not installed.
        EvaluationError: the dataset cannot be fetched or read, or lacks a column.
    """
    local = path.removeprefix(HUGGING_FACE)
    if path.startswith(HUGGING_FACE) and local and Path(local).is_dir():
        return write_files(task, local, Path(local), _files_in(Path(local)), folder), None
    name = hub_name(_default(task) if path == HUGGING_FACE else path)
    if name is None:
        return path, None
    wanted = partial(_wanted_files, task)
    came, files = fetch(name, "dataset", wanted, OPTION, f"file that {task} reads ({_expected(task)})")
    origin = origin_of(came) or str(name)
    if all(one.endswith(".parquet") for one in files):
        return write_files(task, str(name), came, files, folder), origin
    # The cache may hold further files of the repository.
    for one in files:
        (folder / one).parent.mkdir(parents=True, exist_ok=True)
        (folder / one).symlink_to((came / one).resolve())
    return str(folder / files[0] if len(files) == 1 else folder), origin


def write_files(task: str, name: str, came: Path, files: Sequence[str], folder: Path) -> str:
    """Write a dataset as the files of a task and return the folder.

    Args:
        task: its name.
        name: of the dataset, for messages.
        came: the folder with its parquet files.
        files: those files, as paths in that folder.
        folder: an empty folder.

    Raises:
        UsageError: the task has no dataset on the hub, or pyarrow is not installed.
        EvaluationError: a file cannot be read, or lacks a column.
    """
    dataset = DATASETS.get(task)
    if dataset is None:
        raise UsageError(f"{OPTION}={name}: {_no_dataset(task)}")
    for config in _configs(dataset, files):
        for number, split in enumerate(dataset.splits):
            own = _files_of(files, config, split)
            if not own and number < dataset.required:
                raise EvaluationError(
                    f"{OPTION}={name} has no parquet file of config {config}, split {split} ({_expected(task)})"
                )
            rows = [row for one in own for row in _rows(came / one)]
            try:
                if own:
                    dataset.write(folder, config, split, rows)
            except (KeyError, TypeError, IndexError) as error:
                raise EvaluationError(
                    f"{OPTION}={name}, {config}, {split}: a row does not fit {task}: {error!r}"
                ) from None
    return str(folder)


def _default(task: str) -> str:
    if task not in DATASETS:
        raise UsageError(f"{OPTION}={HUGGING_FACE}: {_no_dataset(task)}")
    return DATASETS[task].name


def _no_dataset(task: str) -> str:
    return (
        f"{task} has no Hugging Face dataset with the original fields; give its original files. {HUGGING_FACE} works "
        f"for {', '.join(DATASETS)}"
    )


def _expected(task: str) -> str:
    if task not in DATASETS:
        return f"one that ends in {', '.join(_RECORDS)}"
    dataset = DATASETS[task]
    return (
        f"{dataset.configs[0]}/{dataset.splits[0]}*.parquet, data/{dataset.splits[0]}*.parquet or "
        f"{dataset.splits[0]}*.parquet; @refs/convert/parquet has them for most datasets on the Hugging Face hub"
    )


def _wanted_files(task: str, names: Sequence[str]) -> list[str]:
    """Return the parquet files of the splits that a task needs, or else files that it may read as they are."""
    dataset = DATASETS.get(task)
    if dataset is not None:
        found = {
            file: None
            for config in _configs(dataset, names)
            for split in dataset.splits
            for file in _files_of(names, config, split)
        }
        if found:
            return list(found)
    return [one for one in names if one.endswith(_RECORDS) and Path(one).name not in _NOT_RECORDS]


def _configs(dataset: HubDataset, names: Sequence[str]) -> Sequence[str]:
    """Return the configurations of a dataset; BoolQ is one of those of SuperGLUE."""
    is_super_glue = dataset.write is _boolq and any(one.startswith("boolq/") for one in names)
    return ("boolq",) if is_super_glue else dataset.configs


def _files_of(names: Sequence[str], config: str, split: str) -> list[str]:
    """Return the parquet files of a split, in the first of the layouts that a repository has them in."""
    for pattern in (
        f"{config}/{split}*.parquet",
        f"{config}/{split}/*.parquet",
        f"data/{split}*.parquet",
        f"{split}*.parquet",
    ):
        own = [one for one in names if fnmatch(one, pattern) and one.count("/") == pattern.count("/")]
        if own:
            return sorted(own)
    return []


def _files_in(folder: Path) -> list[str]:
    return [one.relative_to(folder).as_posix() for one in folder.rglob("*.parquet")]


def _rows(file: Path) -> list[HubRow]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            "datasets of hubs need the package pyarrow: pip install 'ascendspeed-eval[datasets]'"
        ) from None
    try:
        rows: list[HubRow] = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise EvaluationError(f"{file} cannot be read: {error}; download it again") from None
    return rows
