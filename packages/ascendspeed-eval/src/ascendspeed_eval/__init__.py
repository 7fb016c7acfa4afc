"""Evaluate language models on benchmarks, with scores that anyone can reproduce; installs and runs without torch.

The names in `__all__` are the public API. They are imported on first use, so that importing the package stays fast.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
"""True for type checkers, which know this name; `typing` would make the import several times slower."""

if TYPE_CHECKING:
    from ascendspeed_eval.backends import find_backends
    from ascendspeed_eval.compare import compare_runs
    from ascendspeed_eval.conversations import ChatSettings
    from ascendspeed_eval.errors import EvaluationError, UsageError
    from ascendspeed_eval.evaluation import Evaluation, prepare_evaluation
    from ascendspeed_eval.model import (
        Backend,
        BackendOption,
        ChatModel,
        EvaluatedModel,
        GenerateRequest,
        GenerateResult,
        LoglikelihoodRequest,
        LoglikelihoodResult,
        ModelDescription,
        RequestFailure,
    )
    from ascendspeed_eval.output_folder import read_samples
    from ascendspeed_eval.report import read_results
    from ascendspeed_eval.runner import evaluate
    from ascendspeed_eval.tasks.base import Task, TaskVariant
    from ascendspeed_eval.tasks.registry import all_tasks, find_task, find_variant
    from ascendspeed_eval.tasks.samples import Benchmark, GenerationSettings, Record, Sample, ScoredSample

_MODULE_OF = {
    "Backend": "model",
    "BackendOption": "model",
    "Benchmark": "tasks.samples",
    "ChatModel": "model",
    "ChatSettings": "conversations",
    "EvaluatedModel": "model",
    "Evaluation": "evaluation",
    "EvaluationError": "errors",
    "GenerateRequest": "model",
    "GenerateResult": "model",
    "GenerationSettings": "tasks.samples",
    "LoglikelihoodRequest": "model",
    "LoglikelihoodResult": "model",
    "ModelDescription": "model",
    "Record": "tasks.samples",
    "RequestFailure": "model",
    "Sample": "tasks.samples",
    "ScoredSample": "tasks.samples",
    "Task": "tasks.base",
    "TaskVariant": "tasks.base",
    "UsageError": "errors",
    "all_tasks": "tasks.registry",
    "compare_runs": "compare",
    "evaluate": "runner",
    "find_backends": "backends",
    "find_task": "tasks.registry",
    "find_variant": "tasks.registry",
    "prepare_evaluation": "evaluation",
    "read_results": "report",
    "read_samples": "output_folder",
}

__all__ = [
    "Backend",
    "BackendOption",
    "Benchmark",
    "ChatModel",
    "ChatSettings",
    "EvaluatedModel",
    "Evaluation",
    "EvaluationError",
    "GenerateRequest",
    "GenerateResult",
    "GenerationSettings",
    "LoglikelihoodRequest",
    "LoglikelihoodResult",
    "ModelDescription",
    "Record",
    "RequestFailure",
    "Sample",
    "ScoredSample",
    "Task",
    "TaskVariant",
    "UsageError",
    "__version__",
    "all_tasks",
    "compare_runs",
    "evaluate",
    "find_backends",
    "find_task",
    "find_variant",
    "prepare_evaluation",
    "read_results",
    "read_samples",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
