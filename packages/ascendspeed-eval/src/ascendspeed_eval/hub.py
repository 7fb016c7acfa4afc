"""Write a Hugging Face dataset as the files that a task reads.

A dataset is named as on the hub (`hf:openai/gsm8k`), or by a folder with the hub's files (`hf:/data/gsm8k`), whose
parquet files are `<config>/<split>*.parquet` or `<split>*.parquet`. `hf:` alone is the task's default dataset.
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


def write_files(task: str, path: str, folder: Path) -> str:
    """Write a dataset as the files of a task and return the folder.

    Args:
        task: its name.
        path: as given to `--task-data-path`: `hf:`, then a name on the hub, a local folder or nothing.
        folder: an empty folder.

    Raises:
        UsageError: the task has no dataset on the hub, or `datasets` is not installed.
        EvaluationError: the dataset cannot be loaded, or lacks a column.
    """
    if task not in DATASETS:
        raise UsageError(
            f"task_data_path={path}: {task} has no Hugging Face dataset with the original fields; give its original "
            f"files. hf: works for {', '.join(DATASETS)}"
        )
    dataset = DATASETS[task]
    name = path.removeprefix(PREFIX) or dataset.name
    configs = ("boolq",) if task == "boolq" and _is_super_glue(name) else dataset.configs
    for config in configs:
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


def _is_super_glue(name: str) -> bool:
    return name.endswith("super_glue") or (Path(name) / "boolq").is_dir()


def _load(name: str, config: str, split: str, needed: bool) -> HubRows | None:
    try:
        import datasets
    except ImportError:
        raise UsageError("hf: needs the package datasets: pip install 'ascendspeed-eval[datasets]'") from None
    folder = Path(name)
    if not folder.is_dir():
        try:
            rows: HubRows = datasets.load_dataset(name, config, split=split)
        except Exception as error:  # noqa: BLE001 - datasets raises errors of many libraries
            raise EvaluationError(f"dataset {name}, {config}, {split} cannot be loaded: {error}") from None
        return rows
    files = sorted(folder.glob(f"{config}/{split}*.parquet")) or sorted(folder.glob(f"{split}*.parquet"))
    if not files and needed:
        raise EvaluationError(f"{folder} has neither {config}/{split}*.parquet nor {split}*.parquet")
    if not files:
        return None
    loaded: list[HubRow] = []
    for file in files:
        try:
            loaded += datasets.Dataset.from_parquet(str(file), cache_dir=None)
        except Exception as error:  # noqa: BLE001 - datasets raises errors of many libraries
            raise EvaluationError(f"{file} cannot be read: {error}; download it again") from None
    return loaded
