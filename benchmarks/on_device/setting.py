"""What the items share: the device, the sizes that suit it, clocks and memory."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.device import HOST, Device
from ascendspeed_core.models.transformer import Transformer
from ascendspeed_core.parallel.mesh import ParallelMesh
from on_device.plan import SHAPES, SMALL, Shape


class LeftOut(Exception):  # noqa: N818 - it is no error
    """This cannot run here; the reason is the message."""


@dataclass(frozen=True)
class Setting:
    """Where items run.

    Attributes:
        device: the accelerator, or a CPU, where everything is small.
        with_profile: add what the device was busy with.
        with_others: measure transformers too.
    """

    device: Device
    with_profile: bool = False
    with_others: bool = True

    @property
    def is_small(self) -> bool:
        """Whether sizes are for a CPU."""
        return self.device.kind == "cpu"

    @property
    def mesh(self) -> ParallelMesh:
        """One process on the device."""
        return ParallelMesh(self.device, Layout())

    def shape(self, name: str) -> Shape:
        """Return the sizes of a model."""
        return SMALL if self.is_small else SHAPES[name]

    def free(self) -> None:
        """Give back what nobody holds, compiled operators too, and count the largest memory from here on."""
        torch.compiler.reset()
        gc.collect()
        if not self.is_small:
            accelerator = getattr(torch, self.device.kind)
            accelerator.synchronize()
            accelerator.empty_cache()
            accelerator.reset_peak_memory_stats()

    def seconds(self, work: Callable[[], object], rounds: int = 5, warm_up: int = 2) -> float:
        """Return the median time of some rounds."""
        for _ in range(warm_up):
            work()
        taken = []
        for _ in range(rounds):
            self.device.synchronize()
            started = time.perf_counter()
            work()
            self.device.synchronize()
            taken.append(time.perf_counter() - started)
        return median(taken)

    def busy(self, work: Callable[[], object], most: int = 14) -> dict[str, Any]:
        """Return where the device's time goes in one call, and the share of the call in which it is busy."""
        self.device.synchronize()
        profiler = self.device.profiler()
        profiler.start()
        started = time.perf_counter()
        work()
        self.device.synchronize()
        seconds = time.perf_counter() - started
        profiler.stop()
        # An operator's own time is that of the kernels which it starts, so only kernels count.
        kernels = [
            one
            for one in profiler.key_averages()
            if str(one.device_type).rpartition(".")[2] != "CPU" and one.self_device_time_total
        ]
        kernels.sort(key=lambda one: -one.self_device_time_total)
        total = sum(one.self_device_time_total for one in kernels)
        return {
            "seconds with the profiler": seconds,
            "device busy": total / 1e6,
            "launches": sum(one.count for one in kernels),
            "kernels": [
                [one.key[:110], one.count, round(one.self_device_time_total / 1e3, 3)]
                for one in kernels[:most]
            ],
        }


def llama(shape: Shape, layers: int | None = None, length: int | None = None, **changes: Any) -> ModelConfig:
    """Return a LLaMA of a shape."""
    values: dict[str, Any] = {
        "family": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_layers": layers or shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.hidden // shape.heads,
        "max_position_embeddings": length or shape.length,
        "norm_epsilon": 1e-5,
        "rotary_base": 10000.0,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return ModelConfig(**(values | changes))


def drawn_model(
    config: ModelConfig, mesh: ParallelMesh, dtype: torch.dtype, joined_projections: bool = False
) -> Transformer:
    """Return a model whose weights are drawn on the device itself: on the host billions of numbers take minutes."""
    from ascendspeed_core.build import build_model

    model = build_model(config, mesh, dtype, joined_projections)
    generator = torch.Generator(mesh.device.torch).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, config.initializer_range, generator=generator)
    return model


def relative_error(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the length of the difference over that of what is wanted; not a number never passes."""
    ours, wanted = ours.detach().to(HOST.torch, torch.float64), wanted.detach().to(HOST.torch, torch.float64)
    return float((ours - wanted).norm() / wanted.norm().clamp_min(1e-30))


def check_within(figures: dict[str, float], tolerance: dict[str, float]) -> None:
    """Raise where a figure is not below its tolerance, which is by its name or the first word of that."""
    limits = {name: tolerance.get(name, tolerance[name.partition(" ")[0]]) for name in figures}
    wrong = [name for name, value in figures.items() if not value <= limits[name]]
    if wrong:
        raise AssertionError("; ".join(f"{name} {figures[name]:.2e} > {limits[name]:.0e}" for name in wrong))
