"""Hugging Face datasets as the files that the tasks read: written once into a folder, then read like any other.

A dataset is named as on the hub (`hf:openai/gsm8k`), or by a folder with the hub's files (`hf:/data/gsm8k`), whose
parquet files are `<config>/<split>*.parquet` or `<split>*.parquet`. `hf:` alone takes the usual one of the task.
"""

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ascendspeed_eval.errors import EvaluationError, UsageError
from ascendspeed_eval.tasks.ceval_subjects import SUBJECTS

PREFIX = "hf:"
Row = Mapping[str, Any]
Rows = Iterable[Row]


@dataclass(frozen=True)
class Dataset:
    """How a dataset becomes files.

    Attributes:
        name: on the hub.
        configs: its configurations.
        splits: their splits, the ones that must be there first.
        required: how many of `splits` must be there.
        write: rows of one configuration and split into files of a folder.
    """

    name: str
    configs: Sequence[str]
    splits: Sequence[str]
    required: int
    write: Callable[[Path, str, str, Rows], None]


def _json_lines(path: Path, rows: Rows) -> None:
    path.write_text(
        "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def _csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def _boolq(folder: Path, config: str, split: str, rows: Rows) -> None:
    keys = ("question", "passage", "answer")
    name = "dev.jsonl" if split == "validation" else "train.jsonl"
    _json_lines(folder / name, ({key: row[key] for key in keys} for row in rows))


def _plain(folder: Path, config: str, split: str, rows: Rows) -> None:
    _json_lines(folder / f"{split}.jsonl", rows)


def _mmlu(folder: Path, config: str, split: str, rows: Rows) -> None:
    for row in rows:
        line = [row["question"], *row["choices"], "ABCD"[row["answer"]]]
        _csv(folder / split / f"{row['subject']}_{split}.csv", [line])


def _ceval(folder: Path, config: str, split: str, rows: Rows) -> None:
    columns = ["id", "question", "A", "B", "C", "D", *([] if split == "test" else ["answer"])]
    _csv(folder / split / f"{config}_{split}.csv", [columns, *([row[c] for c in columns] for row in rows)])


DATASETS: Mapping[str, Dataset] = {
    "boolq": Dataset("google/boolq", ("default",), ("validation", "train"), 1, _boolq),
    "mmlu": Dataset("cais/mmlu", ("all",), ("test", "dev"), 2, _mmlu),
    "gsm8k": Dataset("openai/gsm8k", ("main",), ("test", "train"), 1, _plain),
    "human_eval": Dataset("openai/openai_humaneval", ("openai_humaneval",), ("test",), 1, _plain),
    "ceval": Dataset("ceval/ceval-exam", tuple(sorted(SUBJECTS)), ("val", "dev"), 2, _ceval),
}


def write_files(task: str, path: str, folder: Path) -> str:
    """Write a dataset as the files of a task, and return the folder.

    Args:
        task: its name.
        path: as given to `--task-data-path`, `hf:` and what follows.
        folder: empty.

    Raises:
        UsageError: the task has no such dataset, or `datasets` is not installed.
        EvaluationError: it cannot be loaded, or lacks a column.
    """
    if task not in DATASETS:
        raise UsageError(
            f"task_data_path={path}: no Hugging Face dataset of {task} with its original fields is known; give its own "
            f"files. There is one for {', '.join(DATASETS)}"
        )
    dataset = DATASETS[task]
    name = path.removeprefix(PREFIX) or dataset.name
    for config in dataset.configs:
        for number, split in enumerate(dataset.splits):
            rows = _load(name, config, split, needed=number < dataset.required)
            try:
                if rows is not None:
                    dataset.write(folder, config, split, rows)
            except (KeyError, TypeError, IndexError) as error:
                raise EvaluationError(
                    f"{path}, {config}, {split}: a row does not fit {task}: {error!r}"
                ) from None
    return str(folder)


def _load(name: str, config: str, split: str, needed: bool) -> Rows | None:
    try:
        import datasets
    except ImportError:
        raise UsageError('hf: needs datasets; install "ascendspeed-eval[datasets]"') from None
    place = Path(name)
    if not place.is_dir():
        try:
            rows: Rows = datasets.load_dataset(name, config, split=split)
        except Exception as error:  # noqa: BLE001 - any of a dozen libraries; the message is theirs
            raise EvaluationError(f"dataset {name}, {config}, {split} cannot be loaded: {error}") from None
        return rows
    files = sorted(place.glob(f"{config}/{split}*.parquet")) or sorted(place.glob(f"{split}*.parquet"))
    if not files and needed:
        raise EvaluationError(f"{place} holds neither {config}/{split}*.parquet nor {split}*.parquet")
    if not files:
        return None
    loaded: Rows = [row for file in files for row in datasets.Dataset.from_parquet(str(file), cache_dir=None)]
    return loaded
