"""Find tasks: built in, from packages (entry-point group `ascendspeed_eval.tasks`), or from a file."""

import importlib.util
import inspect
import traceback
from importlib import metadata
from pathlib import Path

from ascendspeed_eval.errors import EvaluationError, UsageError, did_you_mean
from ascendspeed_eval.tasks.agieval import AGIEval
from ascendspeed_eval.tasks.base import Task, TaskVariant
from ascendspeed_eval.tasks.bbh import BBH
from ascendspeed_eval.tasks.boolq import BoolQ
from ascendspeed_eval.tasks.ceval import CEval
from ascendspeed_eval.tasks.gsm8k import GSM8K
from ascendspeed_eval.tasks.human_eval import HumanEval
from ascendspeed_eval.tasks.mmlu import MMLU

ENTRY_POINT_GROUP = "ascendspeed_eval.tasks"
BUILT_IN: tuple[type[Task], ...] = (BoolQ, MMLU, GSM8K, HumanEval, AGIEval, BBH, CEval)


def all_tasks() -> dict[str, Task]:
    """Return every task by name."""
    tasks: dict[str, Task] = {kind.name: kind() for kind in BUILT_IN}
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        task: Task = point.load()()
        tasks[task.name] = task
    return tasks


def find_task(name: str) -> Task:
    """Return the task with this name, or the task that a `.yaml` or `.py` file describes.

    Raises:
        UsageError: the name is unknown.
        EvaluationError: the file is missing or not valid.
    """
    if name.endswith((".yaml", ".yml")):
        from ascendspeed_eval.tasks.custom import read_task

        return read_task(Path(name))
    if name.endswith(".py"):
        return _load_class(Path(name))
    tasks = all_tasks()
    if name not in tasks:
        raise UsageError(
            f"task={name} is unknown; choose from {', '.join(tasks)}, or give your own .yaml or .py file"
            f"{did_you_mean(name, tasks)}"
        )
    return tasks[name]


def _load_class(path: Path) -> Task:
    """Return the one task class that a Python file defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise EvaluationError(f"task={path} does not exist; check --task")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # The line of the file itself, wherever below the error was.
        line = getattr(error, "lineno", None) or next(
            (at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(path)), None
        )
        where = f"{path}, line {line}" if line else str(path)
        raise EvaluationError(f"{where}: {type(error).__name__}: {error}; correct the task") from error
    found = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, Task) and kind.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise EvaluationError(f"{path} defines {len(found)} subclasses of Task; define exactly one")
    task: Task = found[0]()
    return task


def find_variant(task: Task, name: str | None) -> TaskVariant:
    """Return a variant of a task; the default variant if `name` is `None`.

    Raises:
        UsageError: the task has no variant with this name.
    """
    wanted = name or task.default_variant
    if wanted not in task.variants:
        known = ", ".join(task.variants)
        raise UsageError(
            f"protocol={wanted} is unknown for {task.name}; choose from {known}{did_you_mean(wanted, task.variants)}"
        )
    return task.variants[wanted]
