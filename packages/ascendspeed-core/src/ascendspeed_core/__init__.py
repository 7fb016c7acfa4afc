"""Models, parallel layouts and training of large language models; the same code on NPU, GPU and CPU.

The names in `__all__` are the public interface. They are imported on first use (PEP 562), so that importing the package
alone brings neither torch nor numpy nor pydantic along. Everything else may change in any release, except for what
`docs/extending.md` names for extensions.
"""

# Type checkers take this name for true; importing it from typing would cost ten times what this file costs.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from ascendspeed_core.build import apply_kernels as apply_kernels
    from ascendspeed_core.build import build_model as build_model
    from ascendspeed_core.build import load_model as load_model
    from ascendspeed_core.config.finetune import FinetuneConfig as FinetuneConfig
    from ascendspeed_core.config.layout import Layout as Layout
    from ascendspeed_core.config.load import load_config as load_config
    from ascendspeed_core.config.model import ModelConfig as ModelConfig
    from ascendspeed_core.config.optimizer import OptimizerConfig as OptimizerConfig
    from ascendspeed_core.config.parallel import ParallelConfig as ParallelConfig
    from ascendspeed_core.config.preference import DpoConfig as DpoConfig
    from ascendspeed_core.config.source import ModelSourceConfig as ModelSourceConfig
    from ascendspeed_core.config.training import PretrainConfig as PretrainConfig
    from ascendspeed_core.data.micro_batch import MicroBatch as MicroBatch
    from ascendspeed_core.device import Device as Device
    from ascendspeed_core.device import choose_device as choose_device
    from ascendspeed_core.launch import process_group as process_group
    from ascendspeed_core.models.families import known_families as known_families
    from ascendspeed_core.models.transformer import ModelInput as ModelInput
    from ascendspeed_core.models.transformer import ModelOutput as ModelOutput
    from ascendspeed_core.models.transformer import Transformer as Transformer
    from ascendspeed_core.optim.native_engine import NativeEngine as NativeEngine
    from ascendspeed_core.parallel.mesh import ParallelMesh as ParallelMesh
    from ascendspeed_core.training.step import StepResult as StepResult
    from ascendspeed_core.training.step import train_step as train_step
    from ascendspeed_core.training.trainer import Trainer as Trainer
    from ascendspeed_core.training.validate import RunPlan as RunPlan
    from ascendspeed_core.training.validate import plan_run as plan_run
    from ascendspeed_core.weights import InitialWeights as InitialWeights
    from ascendspeed_core.weights import WeightSource as WeightSource
    from ascendspeed_core.weights import open_source as open_source
    from ascendspeed_core.weights import open_weights as open_weights

__version__ = "0.1.0"

_MODULE_OF = {
    "DpoConfig": "config.preference",
    "Device": "device",
    "FinetuneConfig": "config.finetune",
    "InitialWeights": "weights",
    "Layout": "config.layout",
    "MicroBatch": "data.micro_batch",
    "ModelConfig": "config.model",
    "ModelInput": "models.transformer",
    "ModelOutput": "models.transformer",
    "ModelSourceConfig": "config.source",
    "NativeEngine": "optim.native_engine",
    "OptimizerConfig": "config.optimizer",
    "ParallelConfig": "config.parallel",
    "ParallelMesh": "parallel.mesh",
    "PretrainConfig": "config.training",
    "RunPlan": "training.validate",
    "StepResult": "training.step",
    "Trainer": "training.trainer",
    "Transformer": "models.transformer",
    "WeightSource": "weights",
    "apply_kernels": "build",
    "build_model": "build",
    "choose_device": "device",
    "known_families": "models.families",
    "load_config": "config.load",
    "load_model": "build",
    "open_source": "weights",
    "open_weights": "weights",
    "plan_run": "training.validate",
    "process_group": "launch",
    "train_step": "training.step",
}
"""By public name the module that defines it."""

__all__ = [
    "Device",
    "DpoConfig",
    "FinetuneConfig",
    "InitialWeights",
    "Layout",
    "MicroBatch",
    "ModelConfig",
    "ModelInput",
    "ModelOutput",
    "ModelSourceConfig",
    "NativeEngine",
    "OptimizerConfig",
    "ParallelConfig",
    "ParallelMesh",
    "PretrainConfig",
    "RunPlan",
    "StepResult",
    "Trainer",
    "Transformer",
    "WeightSource",
    "apply_kernels",
    "build_model",
    "choose_device",
    "known_families",
    "load_config",
    "load_model",
    "open_source",
    "open_weights",
    "plan_run",
    "process_group",
    "train_step",
]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if not TYPE_CHECKING:  # type checkers would take every misspelt name for one that this may find

    def __getattr__(name: str) -> object:
        """Import a public name when it is first asked for."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
