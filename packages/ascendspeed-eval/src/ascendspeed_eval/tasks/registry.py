"""The tasks that are known: built in, or from packages under the entry-point group `ascendspeed_eval.tasks`."""

from importlib import metadata

from ascendspeed_eval.errors import UsageError, did_you_mean
from ascendspeed_eval.tasks.base import Protocol_, Task
from ascendspeed_eval.tasks.boolq import BoolQ

ENTRY_POINTS = "ascendspeed_eval.tasks"


def all_tasks() -> dict[str, Task]:
    """Return every task by name."""
    tasks: dict[str, Task] = {BoolQ.name: BoolQ()}
    for point in metadata.entry_points(group=ENTRY_POINTS):
        task: Task = point.load()()
        tasks[task.name] = task
    return tasks


def find_task(name: str) -> Task:
    """Return the task of that name, or raise `UsageError`."""
    tasks = all_tasks()
    if name not in tasks:
        raise UsageError(f"task={name} is unknown; there are {', '.join(tasks)}{did_you_mean(name, tasks)}")
    return tasks[name]


def find_protocol(task: Task, name: str | None) -> Protocol_:
    """Return a protocol of a task, by default its own default, or raise `UsageError`."""
    wanted = name or task.default_protocol
    if wanted not in task.protocols:
        known = ", ".join(task.protocols)
        raise UsageError(
            f"protocol={wanted} is unknown for {task.name}; there are {known}{did_you_mean(wanted, task.protocols)}"
        )
    return task.protocols[wanted]
