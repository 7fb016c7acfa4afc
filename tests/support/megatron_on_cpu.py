"""Let megatron-core run on a CPU, in tests only: its modules see a `torch` whose cuda part answers with the CPU.

megatron-core asks torch.cuda for "the device" instead of taking one. Modules imported after `install` keep the real
torch, so it imports those that are used first. It changes `torch.Tensor`: call it in a process of its own.
"""

import contextlib
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from ascendspeed_core.megatron import spare_triton

CPU = torch.device("cpu")
FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros", "zeros_like")
USED = (
    "models.gpt.gpt_layer_specs",
    "models.gpt.gpt_model",
    "inference.contexts",
    "pipeline_parallel",
    "distributed",
    "optimizer",
    "dist_checkpointing",
    "dist_checkpointing.serialization",
    "dist_checkpointing.strategies.torch",
)


class _Done:
    """A stream, or event, whose work is done when it is asked about."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> "_Done":
        return self

    wait_stream = wait_event = wait = synchronize = record = record_event = _nothing


class _Over(types.ModuleType):
    """A module with some names answered differently."""

    def __init__(self, module: types.ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def install() -> None:
    if torch.Tensor.type is _type:
        return
    # It compiles small functions where it may, for a minute each.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].config.disable = True  # type: ignore[attr-defined]
    spare_triton()
    for name in USED:
        importlib.import_module(f"megatron.core.{name}")
    random = {
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
    cuda = _Over(
        torch.cuda,
        is_available=lambda: True,
        current_device=lambda: CPU,
        random=types.SimpleNamespace(**random),
        **random,
        synchronize=_nothing,
        empty_cache=_nothing,
        set_device=_nothing,
        Stream=_Done,
        Event=_Done,
        current_stream=_Done,
        default_stream=_Done,
        stream=lambda stream: contextlib.nullcontext(),
        nvtx=types.SimpleNamespace(range_push=_nothing, range_pop=_nothing),
    )
    over = _Over(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in FACTORIES})
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = over  # type: ignore[attr-defined]
    # Without Transformer Engine it asks whether this is None, and nobody has said so.
    experts: Any = sys.modules["megatron.core.transformer.moe.moe_utils"]
    experts.te_general_gemm = getattr(experts, "te_general_gemm", None)
    exchange: Any = sys.modules["megatron.core.transformer.moe.token_dispatcher"]
    exchange.maybe_move_tensor_to_cpu = _on_host
    seeds: Any = sys.modules["megatron.core.tensor_parallel.random"]
    seeds._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment]
    torch.Tensor.type = _type  # type: ignore[method-assign, assignment]


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What it makes of counts on a GPU, without which it leaves those on a CPU as they are."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.type`, with the names by which megatron-core's optimizers sort parameters."""
    kind = torch._C.TensorBase.type(self, *args, **kwargs)
    return kind if args or kwargs else kind.replace("torch.", "torch.cuda.", 1)


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = CPU
        return make(*args, **kwargs)

    return wrapper
