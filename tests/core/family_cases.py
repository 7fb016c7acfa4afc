"""Cases of families that worker processes run, and how their numbers are compared with a reference's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ascendspeed_ckpt.writers.huggingface_view import HuggingFaceView
from ascendspeed_core.build import load_model
from ascendspeed_core.config.layout import Layout
from ascendspeed_core.config.model import ModelConfig
from ascendspeed_core.data.micro_batch import MicroBatch
from ascendspeed_core.device import Device
from ascendspeed_core.parallel.mesh import ParallelMesh
from ascendspeed_core.parallel.stages import forward_through_stages
from ascendspeed_core.parallel.tensor import gather_logits
from ascendspeed_core.weights import BaseWeightSource, Index, TensorInfo, open_weights
from ascendspeed_core.weights.load import parameter_shapes
from core.training_cases import first_gradients
from support.families import logits_of

# Sums run in another order, and ALiBi adds distances instead of places; fp32 rounds at 6e-8 on logits of about 4.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Tensors(BaseWeightSource):
    """Weights or gradients under our names, as a source."""

    config: ModelConfig
    by_name: Mapping[str, torch.Tensor]
    kind = "test"
    path: Path | None = None

    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self.by_name.items()}

    def read(self, name: str, index: Index = ()) -> torch.Tensor:
        return self.by_name[name][index]


def tokens_of(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (3, 21), generator=torch.Generator().manual_seed(11))


def ours(folder: str, layout: Layout, joined: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of the whole model, and the gradients of this stage."""
    mesh = ParallelMesh.create(Device("cpu"), layout)
    model = load_model(open_weights(Path(folder)), mesh, torch.float32, joined_projections=joined)
    tokens = tokens_of(model.config.vocab_size)
    batch = MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.ones(3, 20))
    gradients = first_gradients(model, [batch], mesh)
    logits = forward_through_stages(model, mesh, batch.input)
    return gather_logits(logits, model.config.vocab_size, mesh.group("tp")), gradients


def theirs(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = tokens_of(125)
    logits = logits_of(model, tokens[:, :-1])
    model.zero_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return logits.detach(), gradients


def largest_differences(
    ranks: list[Any],
    layout: Layout,
    config: ModelConfig,
    model: Any,
    renamed: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
) -> tuple[float, float]:
    """Of logits and of gradients, those compared under the reference's names in its files."""
    want_logits, gradients_by_name = theirs(model)
    want = renamed(gradients_by_name)
    gradients: dict[str, torch.Tensor] = {}
    for number in range(layout.pp):
        for name, gradient in ranks[number * layout.tp * layout.dp][1].items():
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    assert gradients.keys() == parameter_shapes(config).keys()
    got = HuggingFaceView(Tensors(config, gradients))
    assert got.tensors().keys() == want.keys()
    assert min(float(gradient.abs().max()) for gradient in want.values()) > 1e-4
    return (
        max(float((logits - want_logits).abs().max()) for logits, _ in ranks),
        max(float((got.read(name) - want[name]).abs().max()) for name in want),
    )
